"""Convolutions of one and two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.contributions import Factors, summed_positions
from fisherprune.persample.layers.base import Call


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


CPU_BYTES = 2 << 20
"""Of a layer's input, for each thread, that its backward pass takes at a time."""


def _samples_at_once(input: Tensor) -> int:
    """Return how many samples a convolution's backward pass should take at a time.

    On the CPU it copies images into an order of its own and back: copies of a whole
    batch leave the cache, and are pages that the system hands out anew in every layer.
    """
    if input.device.type != "cpu" or input.numel() == 0:
        return len(input)
    bytes_at_once = CPU_BYTES * torch.get_num_threads()
    return max(1, bytes_at_once // (input[0].numel() * input.element_size()))


@dataclass(frozen=True)
class Conv2dLayer:
    """conv2d, zero-padded alike on both sides."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, input, weight, bias):
        """``[N, C, H, W] -> [N, O, P, Q]``."""
        return F.conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )

    def input_grad(self, grad, input, weight):
        """Return the gradient of the input alone."""
        at_once = _samples_at_once(input)
        if at_once >= len(input):
            return self._input_grad(grad, input, weight)
        result = torch.empty_like(input)
        parts = (t.split(at_once) for t in (result, grad, input))
        for part, *operands in zip(*parts, strict=True):
            part.copy_(self._input_grad(*operands, weight))
        return result

    def _input_grad(self, grad, input, weight):
        size = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        return torch.ops.aten.convolution_backward(
            grad, input, weight, None, *size, (True, False, False)
        )[0]

    def weight_grads(self, grad, input, shape):
        """Return the weight's contribution."""
        return Factors(input, grad, shape, vars(self))

    def bias_grads(self, grad):
        """Return the bias's contribution."""
        return summed_positions(grad)


@dataclass(frozen=True)
class Conv1dLayer:
    """conv1d, as the conv2d over an image one pixel high."""

    conv2d: Conv2dLayer

    def forward(self, input, weight, bias):
        """``[N, C, L] -> [N, O, M]``."""
        image = self.conv2d.forward(input.unsqueeze(2), weight.unsqueeze(2), bias)
        return image.squeeze(2)

    def input_grad(self, grad, input, weight):
        """Return the gradient of the input alone."""
        images = (t.unsqueeze(2) for t in (grad, input, weight))
        return self.conv2d.input_grad(*images).squeeze(2)

    def weight_grads(self, grad, input, shape):
        """Return the weight's contribution."""
        shape = (*shape[:2], 1, *shape[2:])
        return self.conv2d.weight_grads(grad.unsqueeze(2), input.unsqueeze(2), shape)

    def bias_grads(self, grad):
        """Return the bias's contribution."""
        return summed_positions(grad)


def _same_padding(input, weight, padding, dilation):
    """Turn "same" and "valid" into numbers; an uneven "same" pads the input itself."""
    if padding == "valid":
        return input, (0, 0)
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if not any(total % 2 for total in totals):
        return input, tuple(total // 2 for total in totals)
    sides = [(total // 2, total - total // 2) for total in reversed(totals)]
    return F.pad(input, [side for pair in sides for side in pair]), (0, 0)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Sort the arguments of ``F.conv2d`` out."""
    dilation = _pair(dilation)
    if isinstance(padding, str):
        input, padding = _same_padding(input, weight, padding, dilation)
    layer = Conv2dLayer(_pair(stride), _pair(padding), dilation, groups)
    return Call(layer, input, weight, bias, dims=4)


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Sort the arguments of ``F.conv1d`` out."""
    dilation = _pair(dilation)[:1]
    if isinstance(padding, str):
        input, padding = _same_padding(input, weight, padding, dilation)
    stride, padding = (1, _pair(stride)[0]), (0, _pair(padding)[0])
    image = Conv2dLayer(stride, padding, (1, *dilation), groups)
    return Call(Conv1dLayer(image), input, weight, bias, dims=3)
