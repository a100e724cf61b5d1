"""Parameters as [out, in, taps]: how structures see weights of any layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def cube(shape: Sequence[int], transposed: bool) -> tuple[int, int, int]:
    """Return [out, in, taps] of a shape: outputs, inputs and positions of a kernel.

    A parameter with one dimension has one input, so a bias is [out, 1, 1]; where it is
    ``transposed`` the first dimension is that of the inputs.
    """
    out, inputs, *taps = *shape, *[1] * (2 - len(shape))
    if transposed and len(shape) > 1:
        out, inputs = inputs, out
    return out, inputs, math.prod(taps)


def as_cube(tensor: Tensor, transposed: bool) -> Tensor:
    """View, or copy, a parameter's tensor as [out, in, taps]."""
    swapped = transposed and tensor.dim() > 1
    moved = tensor.transpose(0, 1) if swapped else tensor
    return moved.reshape(cube(tensor.shape, transposed))


def from_cube(values: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """Return a tensor of [out, in, taps] in the parameter's own shape, contiguous."""
    if not transposed or len(shape) < 2:
        return values.reshape(tuple(shape)).contiguous()
    first, second, *taps = shape
    return values.reshape(second, first, *taps).transpose(0, 1).contiguous()
