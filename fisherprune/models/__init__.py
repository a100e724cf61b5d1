"""CIFAR variants of the networks of the pruning literature, and any others by name.

Every constructor takes ``num_classes`` and ``in_channels``; ``MODELS`` maps their names
to them. Without an ``init`` of ``create``, weights start from PyTorch's default
initialization of Conv2d and Linear (He et al.'s uniform bound with a = sqrt(5));
BatchNorm starts from weight 1 and bias 0.
"""

from __future__ import annotations

import torch
from torch import nn

from fisherprune.models.initial import INITS, checked_init, initialize_
from fisherprune.models.registry import MODELS
from fisherprune.models.resnet import (
    ResNet,
    resnet18,
    resnet20,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from fisherprune.models.resolve import (
    build,
    check_name,
    check_outputs,
    source_hash,
)
from fisherprune.models.vgg import (
    VGG,
    lottery_vgg11,
    lottery_vgg16,
    vgg11,
    vgg13,
    vgg16,
    vgg19,
)

__all__ = [
    "INITS",
    "MODELS",
    "VGG",
    "ResNet",
    "check_name",
    "create",
    "initialize_",
    "lottery_vgg11",
    "lottery_vgg16",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "source_hash",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]


def create(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    image_size: int = 32,
    init: str = "default",
    seed: int | None = None,
) -> nn.Module:
    """Build a network by its name.

    Args:
        name: a key of ``MODELS``; ``torchvision:NAME`` for a network of torchvision's,
            without its weights, which takes images of 3 channels; or
            ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` for a function that returns any
            network. It is called with the keyword arguments num_classes, in_channels
            and image_size, as far as it takes them; num_classes it must take.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: their height and width; our networks take any.
        init: how the weights are initialized, a key of ``INITS``; see ``initialize_``.
        seed: where given, the initial weights depend on it alone, and the global
            random state is left as it was.

    Returns:
        The network on the CPU, in training mode.

    Raises:
        FisherpruneError: for an unknown name or ``init``, and for a function or a
            network that fails or returns something else.
    """
    check_name(name)
    checked_init(init)
    if seed is None:
        return _create(name, init, num_classes, in_channels, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _create(name, init, num_classes, in_channels, image_size)


def _create(name: str, init: str, *sizes: int) -> nn.Module:
    network = _built(name, *sizes)
    initialize_(network, init)
    return network


def _built(name: str, *sizes: int) -> nn.Module:
    """Build a network; one that is not ours is tried on images that are all zero."""
    if name in MODELS:
        num_classes, in_channels, _ = sizes
        return MODELS[name](num_classes, in_channels)
    network = build(name, *sizes)
    with torch.random.fork_rng(devices=[]):
        check_outputs(name, network, *sizes)
    return network
