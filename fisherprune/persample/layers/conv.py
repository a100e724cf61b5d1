"""Convolutions of one and two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.contributions import Rows, summed_positions
from fisherprune.persample.factors import Factors
from fisherprune.persample.registry import LayerCall, register_layer

Sizes = int | Sequence[int]


def numbers(value: Sizes, count: int) -> tuple[int, ...]:
    """Return a size for each of ``count`` dimensions."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * count if len(sizes) == 1 else sizes


CPU_BYTES = 2 << 20
"""Bytes of a layer's input for each thread that its backward pass takes at a time."""


def _samples_at_once(input: Tensor) -> int:
    """Return how many samples a convolution's backward pass should take at a time.

    On the CPU it copies images into an order of its own and back: copies of a whole
    batch leave the cache, and are pages that the system hands out anew in every layer.
    Images in channels_last lie in that order.
    """
    count = input.shape[0]
    if not input.is_cpu or input.numel() == 0 or input.stride(1) == 1:
        return count
    bytes_at_once = CPU_BYTES * torch.get_num_threads()
    return max(1, bytes_at_once // (input.nbytes // count))


def input_grads(grad: Tensor, input: Tensor, weight: Tensor, *size: Any) -> Tensor:
    """Return the gradient of a convolution's input, some samples at a time.

    ``size`` is stride, padding, dilation, transposed, output padding and groups.
    """
    at_once = _samples_at_once(input)
    if at_once >= input.shape[0]:
        return _input_grads(grad, input, weight, *size)
    result = torch.empty_like(input)
    parts = (t.split(at_once) for t in (result, grad, input))
    for part, some_grad, some_input in zip(*parts, strict=True):
        part.copy_(_input_grads(some_grad, some_input, weight, *size))
    return result


def _input_grads(grad: Tensor, input: Tensor, weight: Tensor, *size: Any) -> Tensor:
    return torch.ops.aten.convolution_backward.default(
        grad, input, weight, None, *size, (True, False, False)
    )[0]


@dataclass(frozen=True)
class ZeroPadded:
    """A convolution, zero-padded alike on both sides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return what the framework does, of the output's gradient."""
        more = (0,) * len(self.stride)
        size = self.stride, self.padding, self.dilation, False, more, self.groups
        return input_grads(grad, input, weight, *size)


class _Conv2d(ZeroPadded):
    """conv2d."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, C, H, W] -> [N, O, P, Q]``."""
        return F.conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> Factors:
        return Factors(input, grad, shape, vars(self))

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad)


@dataclass(frozen=True)
class _Conv1d:
    """conv1d, as the conv2d over an image one pixel high."""

    conv2d: _Conv2d

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, C, L] -> [N, O, M]``."""
        image = self.conv2d.forward(input.unsqueeze(2), weight.unsqueeze(2), bias)
        return image.squeeze(2)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        images = (t.unsqueeze(2) for t in (grad, input, weight))
        return self.conv2d.input_grad(*images).squeeze(2)

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> Factors:
        shape = (*shape[:2], 1, *shape[2:])
        return self.conv2d.weight_grads(grad.unsqueeze(2), input.unsqueeze(2), shape)

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad)


def padded(
    input: Tensor, weight: Tensor, padding: Sizes | str, dilation: Sequence[int]
) -> tuple[Tensor, Sizes]:
    """Turn "same" and "valid" into numbers; an uneven "same" pads the input itself."""
    if not isinstance(padding, str):
        return input, padding
    if padding == "valid":
        return input, 0
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if not any(total % 2 for total in totals):
        return input, [total // 2 for total in totals]
    sides = [(total // 2, total - total // 2) for total in reversed(totals)]
    return F.pad(input, [side for pair in sides for side in pair]), 0


@register_layer(F.conv1d)
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> LayerCall:
    """Sort the arguments of ``F.conv1d`` out."""
    (step,), (spread,) = numbers(stride, 1), numbers(dilation, 1)
    input, sides = padded(input, weight, padding, [spread])
    image = _Conv2d((1, step), (0, *numbers(sides, 1)), (1, spread), groups)
    return LayerCall(_Conv1d(image), input, weight, bias, dims=3, positions=False)


@register_layer(F.conv2d)
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> LayerCall:
    """Sort the arguments of ``F.conv2d`` out."""
    spread = numbers(dilation, 2)
    input, sides = padded(input, weight, padding, spread)
    layer = _Conv2d(numbers(stride, 2), numbers(sides, 2), spread, groups)
    return LayerCall(layer, input, weight, bias, dims=4, positions=False)
