"""How many weights are kept: of all together, or of each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real

import numpy as np

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.densities import checked_densities, erk_densities, keep_counts
from fisherprune.parameters import fitted_names

SCOPES = ("global", "layer", "erk", "densities")
"""Where scores compete: over all, or in each layer at densities of three kinds."""

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


def kept_counts(
    shapes: Shapes,
    sparsity: float,
    scope: str = "global",
    *,
    densities: Densities | None = None,
) -> Counts:
    """Return how many weights ``select_masks`` would keep; no score is needed.

    So mistakes are found before scores are made.

    Args:
        shapes: of the parameters, by name.
        sparsity: fraction removed, in [0, 1].
        scope: as in ``select_masks``.
        densities: as in ``select_masks``.

    Returns:
        One number for scope "global", or one for each parameter.

    Raises:
        FisherpruneError: for any reason of ``select_masks`` but the scores.
    """
    sparsity = checked_sparsity(sparsity)
    checked_scope(scope, densities)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if not any(sizes.values()):
        raise FisherpruneError("select_masks: scores must hold at least one entry")
    keep = keep_count(sum(sizes.values()), sparsity)
    if scope == "global":
        return keep
    if scope == "layer":
        return {name: keep_count(size, sparsity) for name, size in sizes.items()}
    if scope == "erk":
        return keep_counts(erk_densities(shapes), sizes, keep)
    given = checked_densities(densities)
    if fit := fitted_names(given, sizes):  # one of the models was wrapped
        given = {fit[name]: density for name, density in given.items()}
    return keep_counts(given, sizes, keep)


def checked_scope(scope: str, densities: Densities | None = None) -> str:
    """Return ``scope`` if it is one of ``SCOPES``, with densities where it needs them.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(scope, str) or scope not in SCOPES:
        raise FieldError("scope", f"one of {SCOPES}", shown(scope))
    if (scope == "densities") != (densities is not None):
        wanted = f"given for scope densities, and for no other; scope is {scope}"
        raise FieldError("densities", wanted, shown(densities))
    return scope
