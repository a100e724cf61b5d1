"""Residual networks for small images (He et al. 2016, arXiv 1512.03385).

ResNet18 to 152 are the ImageNet networks with a 3x3 stem of stride 1 and no max-pool,
as is usual for 32x32 images; ResNet20 is the paper's own network for CIFAR. Any image
size works: the feature map is averaged over all its positions before the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the image size, up to its stride."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ProjectionShortcut(nn.Sequential):
    """Option B of the paper: a strided 1x1 convolution with BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Map ``inputs`` channels to ``outputs``, the image size divided by stride."""
        super().__init__(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False),
            nn.BatchNorm2d(outputs),
        )


class PaddingShortcut(nn.Module):
    """Option A of the paper: every stride-th pixel, new channels filled with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Pad ``inputs`` channels to ``outputs``, half before and half behind."""
        super().__init__()
        before = (outputs - inputs) // 2
        self.channels = (before, outputs - inputs - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the thinned-out and padded images."""
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, *self.channels))


Shortcut = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: Shortcut
    ) -> None:
        """Map ``inputs`` channels to ``width``; ``stride`` is the first conv's."""
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut around them; the 3x3 strides."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: Shortcut
    ) -> None:
        """Map ``inputs`` channels to ``4 * width`` through ``width`` in between."""
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, ``layer1`` to ``layerN`` of residual blocks, mean, ``linear``."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Shortcut = ProjectionShortcut,
    ) -> None:
        """Build the network.

        Args:
            block: kind of residual block.
            depths: number of blocks of each layer.
            widths: channels of each layer; layers from the second on halve the image.
            num_classes: outputs of the classifier.
            in_channels: channels of the images.
            shortcut: what replaces the identity where a block changes the shape.
        """
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.layers = len(widths)
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.layers):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


WIDTHS = (64, 128, 256, 512)


def resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet18 for small images, 11,173,962 parameters with 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), WIDTHS, num_classes, in_channels)


def resnet34(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet34 for small images, 21,282,122 parameters with 10 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), WIDTHS, num_classes, in_channels)


def resnet50(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet50 for small images, 23,520,842 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), WIDTHS, num_classes, in_channels)


def resnet101(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet101 for small images, 42,512,970 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), WIDTHS, num_classes, in_channels)


def resnet152(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet152 for small images, 58,156,618 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), WIDTHS, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet20 of section 4.2 of the paper: 16 to 64 channels, 269,722 parameters.

    Its shortcuts are of option A and have no parameters.
    """
    return ResNet(
        BasicBlock, (3, 3, 3), (16, 32, 64), num_classes, in_channels, PaddingShortcut
    )
