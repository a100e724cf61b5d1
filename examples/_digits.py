"""What the recipes share: scikit-learn's digits, a small network and its training."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fisherprune.data import load


def digits():
    """Return images ``[N, 1, 8, 8]`` and labels for training, and those for testing."""
    return [(part.normalize(part.images), part.labels) for part in load("digits")]


def network(classes=10):
    """Return a small convolutional network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, classes)),
    )


def sgd(model, lr=0.05):
    """Return the usual optimizer."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def train(model, x, y, epochs, optimizer=None, penalty=None):
    """Train, and return the model; ``penalty(model)`` is added to every loss."""
    optimizer = optimizer or sgd(model)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            loss = cross_entropy(model(x[rows]), y[rows])
            if penalty:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, x, y):
    """Return the fraction of the images whose class the model finds."""
    return float((model(x).argmax(1) == y).float().mean())
