"""CIFAR variants of the networks of the pruning literature.

Every constructor takes ``num_classes`` and ``in_channels``; ``MODELS`` maps their names
to them. All weights start from PyTorch's default initialization of Conv2d and Linear
(He et al.'s uniform bound with a = sqrt(5)), BatchNorm from weight 1 and bias 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.models.resnet import (
    ResNet,
    resnet18,
    resnet20,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from fisherprune.models.vgg import VGG, vgg11, vgg13, vgg16, vgg19

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
}

__all__ = ["MODELS", "ResNet", "VGG", "create", *MODELS]


def create(
    name: str, num_classes: int = 10, in_channels: int = 3, *, seed: int | None = None
) -> nn.Module:
    """Build a network of ``MODELS``.

    Args:
        name: a key of ``MODELS``.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        seed: where given, the initial weights depend on it alone, and the global
            random state is left as it was.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        FisherpruneError: for a name that is not in ``MODELS``.
    """
    if name not in MODELS:
        known = ", ".join(MODELS)
        raise FisherpruneError(f"model must be one of {known}; got {name!r}")
    if seed is None:
        return MODELS[name](num_classes, in_channels)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return MODELS[name](num_classes, in_channels)
