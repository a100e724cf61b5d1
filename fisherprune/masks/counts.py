"""How many weights are kept: of all together, or of each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real

import numpy as np

from fisherprune.errors import FieldError, shown

ROUNDING = Fraction(4, 2**53)
"""How far a sparsity may be from the fraction that it means, by errors of floats."""

Densities = Mapping[str, float]
Shapes = Mapping[str, Sequence[int]]
"""By parameter name."""
Counts = int | dict[str, int]
"""Weights kept of all together, or of each parameter."""


def checked_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a number in [0, 1].

    Raises:
        FisherpruneError: where it is not.
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity <= 1:
        raise FieldError("sparsity", "a number in [0, 1]", shown(sparsity))
    narrow = isinstance(sparsity, np.floating)  # 0.9 in float32 means 0.9
    return float(str(sparsity)) if narrow else float(sparsity)


def keep_count(n: int, sparsity: float) -> int:
    """Return how many of ``n`` weights are kept: ``max(1, floor((1 - sparsity) n))``.

    Exact: the sparsity is taken as the decimal number it prints as, so 0.9 of 10
    weights keeps 1. A sparsity that is less than ``4 / 2**53`` above a fraction
    ``k / n``, as sums and differences of numbers up to 1 are by rounding, means that
    fraction: ``1 - 0.7``, which is 0.30000000000000004, of 10 weights keeps 7. Of no
    weights none is kept.

    Example:
        >>> keep_count(10, 0.9), keep_count(10, 1 - 0.7), keep_count(10, 1.0)
        (1, 7, 1)
    """
    share = 1 - Fraction(repr(float(sparsity)))
    return min(n, max(1, math.floor((share + ROUNDING) * n)))
