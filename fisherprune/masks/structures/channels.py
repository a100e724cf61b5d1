"""Structure "channels": whole output channels are kept or pruned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fisherprune.masks.structures.layout import cube
from fisherprune.masks.structures.registry import register_structure
from fisherprune.masks.structures.units import Units


@register_structure("channels", "whole output channels")
class Channels(Units):
    """Slices of dimension 0; of dimension 1 where a layer's weight is transposed.

    A bias or a scale has one weight a channel. A transposed convolution with groups
    has one slice for the channels of the same index in all groups.
    """

    def unit(self, shape: Sequence[int], transposed: bool) -> int:
        """Return the number of weights of a channel."""
        _, inputs, taps = cube(shape, transposed)
        return inputs * taps

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of each channel: [out]."""
        return values.sum((1, 2))

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Give each weight of a channel what its channel has."""
        return units[:, None, None].expand(*shape)
