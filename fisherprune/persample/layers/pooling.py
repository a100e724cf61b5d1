"""Max-pooling, which has no parameter, by kernels that are faster than PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fisherprune import ops
from fisherprune.ops import reference
from fisherprune.persample.calls import is_transformed
from fisherprune.persample.registry import LayerCall, register_layer

FEW = 2**14
"""Entries of an input for which the call of an op takes longer than what it does."""


@dataclass
class _MaxPool:
    """max_pool2d of contiguous images: all of their channels are those of one image."""

    options: tuple[Sequence[int] | bool, ...]
    shape: tuple[int, ...]
    index: Tensor | None = None

    def forward(self, input: Tensor, weight: None, bias: None) -> Tensor:
        """``[N, C, H, W] -> [N, C, P, Q]``."""
        image = input.view(1, -1, *self.shape[2:])
        output, self.index = torch.ops.fisherprune.max_pool2d(image, *self.options)
        return torch.ops.aten._unsafe_view(output, (*self.shape[:2], *output.shape[2:]))

    def input_grad(self, grad: Tensor, input: Tensor | None, weight: None) -> Tensor:
        assert self.index is not None
        size = 1, self.shape[0] * self.shape[1], *self.shape[2:]
        given: Any = grad.reshape(self.index.shape), self.index, size, *self.options
        if torch.is_grad_enabled():  # it may be differentiated again
            return reference.max_pool2d_backward(*given).view(self.shape)
        found = torch.ops.fisherprune.max_pool2d_backward(*given)
        return found.view(self.shape)


def _covers(input: Tensor, options: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether the kernels do what PyTorch does, and faster."""
    return (
        type(input) is Tensor
        and input.dim() == 4
        and input.is_cpu
        and input.dtype == torch.float32
        and input.numel() >= FEW
        and input.is_contiguous()
        and not input.is_contiguous(memory_format=torch.channels_last)
        and not is_transformed(input)
        and forward_ad.unpack_dual(input).tangent is None
        and all(len(each) == 2 for each in options)
        and math.prod(options[0]) <= ops.MOST_PLACES
        and all(map(_fits, input.shape[2:], *options))
    )


def _fits(size: int, kernel: int, step: int, padding: int, dilation: int) -> bool:
    """Return whether the kernels have it; what is no window, PyTorch refuses."""
    is_window = 0 < kernel <= size and step > 0 and 0 <= 2 * padding <= kernel
    return is_window and dilation == 1


def _axes(value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


@register_layer(F.max_pool2d)
def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> LayerCall | None:
    """Sort the arguments of ``F.max_pool2d`` out, where the kernels are faster."""
    kernel = _axes(kernel_size)
    windows = kernel, kernel if stride is None else _axes(stride), _axes(padding)
    if return_indices or not _covers(input, (*windows, _axes(dilation))):
        return None
    # It has no parameter, so none of their gradients.
    layer: Any = _MaxPool((*windows, ceil_mode), tuple(input.shape))
    return LayerCall(layer, input, None, None, reads_input=False)
