"""Small networks that between them have every supported kind of layer."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import nn

from fisherprune import models


def randomized(model):
    """Give BatchNorm layers statistics as after training, so that eval mode shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def conv_net(classes=5):
    """Convolutions with stride, dilation, groups, odd channels; inputs [N, 3, 9, 9]."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, (3, 1), padding="same", dilation=(2, 1), groups=8),
            nn.Tanh(),
            nn.Conv2d(8, 7, (2, 4), padding="same"),
            nn.Flatten(),
            nn.Linear(7 * 25, 11),
            nn.BatchNorm1d(11),
            nn.ReLU(inplace=True),
            nn.Linear(11, classes),
        )
    )


def narrow_vgg11():
    """VGG11 of a fourth of the channels; images of three."""
    with patch("fisherprune.models.vgg.WIDTHS", (16, 32, 64, 128, 128)):
        return models.vgg11()


class SequenceNet(nn.Module):
    """Conv1d, then Linear over positions; inputs [N, 4, 12]."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.embed = nn.Linear(6, 8)
        self.mix = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mT
        x = torch.relu(self.embed(x))
        x = x + torch.tanh(self.mix(x.unsqueeze(2)).squeeze(2))
        return self.head(x.mean(1))


class TwiceNet(nn.Module):
    """Every weight is used twice, at different sizes; inputs [N, 4, 8, 8]."""

    def __init__(self, groups=2, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)
        randomized(self)

    def forward(self, x):
        x = torch.tanh(self.bn(self.conv(x)))
        x = nn.functional.avg_pool2d(x, 2)
        x = torch.tanh(self.bn(self.conv(x)))
        x = torch.tanh(self.fc(x.flatten(2).mT))
        x = torch.tanh(self.fc(x.mean(1)))
        return self.head(x)


class Mixing(nn.Module):
    """Two Linear layers and what comes between them; inputs [N, 4]."""

    def __init__(self, mix, width=4):
        super().__init__()
        self.fc, self.head = nn.Linear(4, width), nn.Linear(width, 5)
        self.mix = mix

    def forward(self, x):
        return self.head(self.mix(self, self.fc(x)))


class Own(nn.Module):
    """A module of given parts and a given forward pass, ``forward(module, x)``."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class RowByRow(nn.Module):
    """Runs a layer in a transform, where no call is seen; inputs [N, T, 4]."""

    def __init__(self, mix=lambda h: h):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.head, self.mix = nn.Linear(6, 5), mix
        randomized(self)

    def forward(self, x):
        h = torch.func.vmap(lambda row: torch.tanh(self.fc(row)).sum(0))(x)
        return self.head(self.mix(self.norm(h)))


def batches(x, y, size):
    """Cut a data set into batches."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def data(shape, samples=13, classes=5):
    """Draw inputs and labels."""
    return torch.randn(samples, *shape), torch.randint(classes, (samples,))
