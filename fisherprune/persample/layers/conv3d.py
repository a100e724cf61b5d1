"""Convolutions of three dimensions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.contributions import Rows, summed_positions
from fisherprune.persample.layers.conv import Sizes, ZeroPadded, numbers, padded
from fisherprune.persample.registry import LayerCall, register_layer
from fisherprune.persample.volumes import Volume, VolumeFactors


class _Conv3d(ZeroPadded):
    """conv3d."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, C, D, H, W] -> [N, O, E, P, Q]``."""
        return F.conv3d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> VolumeFactors:
        return VolumeFactors((Volume(input, grad, vars(self)),), shape)

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad)


@register_layer(F.conv3d)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> LayerCall:
    """Sort the arguments of ``F.conv3d`` out."""
    spread = numbers(dilation, 3)
    input, sides = padded(input, weight, padding, spread)
    layer = _Conv3d(numbers(stride, 3), numbers(sides, 3), spread, groups)
    return LayerCall(layer, input, weight, bias, dims=5, positions=False)
