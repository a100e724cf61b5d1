"""The channels of layers: how many, where they lie, and what is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.modules import TRANSPOSED

CONVOLUTIONS = nn.modules.conv._ConvNd
NORMALIZATIONS = nn.modules.batchnorm._BatchNorm


def is_depthwise(module: nn.Module) -> bool:
    """Return whether each output channel is made of the input channel of its number."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == module.in_channels == module.out_channels > 1
    )


def is_reader(module: nn.Module) -> bool:
    """Return whether its outputs are sums over its input channels."""
    return isinstance(module, CONVOLUTIONS | nn.Linear) and not is_depthwise(module)


def is_passing(module: nn.Module) -> bool:
    """Return whether it maps each channel by itself."""
    return is_depthwise(module) or isinstance(module, NORMALIZATIONS | nn.PReLU)


def channels_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a view of a layer's input or output, its channels first: [C, ...]."""
    if isinstance(module, nn.Linear):
        return tensor.movedim(-1, 0)
    if isinstance(module, CONVOLUTIONS):
        return tensor.movedim(1 - module.weight.dim(), 0)
    return tensor.movedim(1, 0)


def pruned_channels(module: nn.Module, mask: Tensor) -> Tensor:
    """Return the output channels of which the mask of a weight keeps nothing.

    Args:
        module: has the weight.
        mask: bool, True = kept.

    Returns:
        bool ``[C]``.
    """
    if isinstance(module, TRANSPOSED):  # [in, out / groups, ...]
        shape = groups_of(module, True), -1, mask.shape[1], mask[0, 0].numel()
        parts = mask.reshape(shape)
        return ~parts.any(3).any(1).flatten()
    return ~mask.reshape(len(mask), -1).any(1)


def folds(module: nn.Module) -> bool:
    """Return whether a bias can stand for a constant input: nothing pads it."""
    if isinstance(module, TRANSPOSED):
        return False
    if not isinstance(module, CONVOLUTIONS) or module.padding_mode != "zeros":
        return True
    if isinstance(module.padding, str):
        return module.padding == "valid" or all(k == 1 for k in module.kernel_size)
    return not any(module.padding)


def by_input(module: nn.Module, weight: Tensor) -> Tensor:
    """Return what output o reads of input channel i, summed over taps: [out, in]."""
    sums = weight.detach().flatten(2).sum(2) if weight.dim() > 2 else weight.detach()
    groups = groups_of(module)
    if groups == 1:
        return sums
    parts = sums.view(groups, -1, sums.shape[1])
    return torch.block_diag(*parts)


def groups_of(module: nn.Module, single: bool = False) -> int:
    """Return in how many parts a layer reads and makes channels.

    Args:
        module: any.
        single: count a depthwise convolution's, too, which go alone.
    """
    if not isinstance(module, CONVOLUTIONS) or (is_depthwise(module) and not single):
        return 1
    return module.groups


def size_of(module: nn.Module, inputs: bool) -> int:
    """Return how many channels a layer reads or makes."""
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels if inputs else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if inputs else module.out_features
    if isinstance(module, nn.PReLU):  # one slope may be for all channels
        return module.num_parameters if module.num_parameters > 1 else 0
    size: Any = getattr(module, "num_features", 0)
    return size
