"""A call of a layer function, with its arguments sorted out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A call of a supported function, with its arguments sorted out."""

    layer: object
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dims: int | None  # the input's dimensions, samples first; None = at least two
