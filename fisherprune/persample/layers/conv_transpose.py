"""Transposed convolutions of one, two and three dimensions.

Such a layer is the gradient of a convolution with respect to its input. So its weight's
gradient is that convolution's, with the roles swapped: the gradient of the layer's
output is the convolution's input, the layer's input the gradient of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.contributions import (
    LayerContribution,
    Rows,
    summed_positions,
)
from fisherprune.persample.factors import Factors
from fisherprune.persample.layers.conv import Sizes, input_grads, numbers
from fisherprune.persample.registry import LayerCall, register_layer
from fisherprune.persample.volumes import Volume, VolumeFactors

FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
"""By the number of dimensions."""


@dataclass(frozen=True)
class _ConvTranspose:
    """conv_transpose1d, 2d or 3d: as many as the sizes have numbers."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, C, *] -> [N, O, *]``."""
        function = FUNCTIONS[len(self.stride)]
        size = self.stride, self.padding, self.output_padding
        return function(input, weight, bias, *size, self.groups, self.dilation)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        size = self.stride, self.padding, self.dilation
        more = self.output_padding, self.groups
        return input_grads(grad, input, weight, *size, True, *more)

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> LayerContribution:
        conv: dict[str, Any] = vars(self).copy()
        input = self._at_all_positions(input, conv.pop("output_padding"))
        if len(self.stride) == 3:
            return VolumeFactors((Volume(grad, input, conv),), shape)
        if len(self.stride) == 1:
            first = {"stride": 1, "padding": 0, "dilation": 1}
            conv |= {key: (value, *conv[key]) for key, value in first.items()}
            grad, input = grad.unsqueeze(2), input.unsqueeze(2)
            shape = (*shape[:2], 1, *shape[2:])
        return Factors(grad, input, shape, conv)

    def _at_all_positions(self, input: Tensor, output_padding: Sequence[int]) -> Tensor:
        """Append zeros where the convolution has more positions than ``input``.

        An output padding of one stride or more makes room for them.
        """
        pairs = zip(output_padding, self.stride, strict=True)
        ends = [(0, more // step) for more, step in pairs]
        if not any(end for _, end in ends):
            return input
        return F.pad(input, [side for pair in reversed(ends) for side in pair])

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad)


@register_layer(F.conv_transpose3d)
@register_layer(F.conv_transpose2d)
@register_layer(F.conv_transpose1d)
def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> LayerCall:
    """Sort the arguments of the three functions out."""
    sizes = stride, padding, output_padding, dilation
    step, sides, ends, spread = (numbers(size, weight.dim() - 2) for size in sizes)
    layer = _ConvTranspose(step, sides, ends, groups, spread)
    return LayerCall(layer, input, weight, bias, dims=weight.dim(), positions=False)
