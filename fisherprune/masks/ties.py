"""Equal scores on both sides of the threshold: whether they decide too much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.shards import count_true

TIES = ("error", "position")
"""What to do where equal scores at the threshold decide what is kept."""

DECIDED_BY_POSITION = Fraction(1, 20)
"""Share of the kept weights that ties may decide. Scores in bfloat16, of three digits,
tie for fewer by their rounding alone; scores that can't tell weights apart, zeros of a
dead layer for instance, tie for most of them."""

FEW_TIES = 10
"""Ties that may decide in any case."""


def checked_ties(ties: str) -> str:
    """Return ``ties`` if it is one of ``TIES``.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(ties, str) or ties not in TIES:
        raise FieldError("ties", f"one of {TIES}", shown(ties))
    return ties


def tie_ranks(k: int, total: int) -> tuple[int, int]:
    """Return two ranks around the k-th largest score; ties decide where they tie.

    Then so many scores on either side of the threshold are equal, or all are. Of no
    score, or all, there is nothing to decide: rank 0 has no score.
    """
    if not 0 < k < total:
        return 0, 0
    some = max(FEW_TIES, math.floor(k * DECIDED_BY_POSITION) + 1)
    return (k - some + 1, k + some) if some <= min(k, total - k) else (1, total)


def few_ties(ties: int, kept: int) -> bool:
    """Return whether so few equal scores may decide, on either side of a threshold."""
    return ties <= max(FEW_TIES - 1, math.floor(kept * DECIDED_BY_POSITION))


def refuse_ties(ties: Sequence[tuple[Mapping[str, Tensor], int, float]]) -> None:
    """Name the parameters with the most ties, of scores, keep counts and thresholds."""
    equal, places = dict[str, int](), 0
    for tensors, keep, threshold in ties:
        places += keep
        for name, s in tensors.items():
            found = count_true({"equal": s == threshold, "above": s > threshold})
            equal[name] = found["equal"]
            places -= found["above"]
    refuse_equal(equal, places, f" of {ties[0][2]:g}")


def refuse_equal(equal: Mapping[str, int], places: int, which: str) -> None:
    """Name the parameters with the most of the equal scores that compete."""
    most = sorted((n for n in equal if equal[n]), key=lambda name: -equal[name])
    named = ", ".join(f"{name!r} ({equal[name]:,})" for name in most[:3])
    raise FisherpruneError(
        "select_masks: scores must decide which weights are kept, but "
        f"{sum(equal.values()):,} equal scores{which} compete for "
        f"{places:,} places, most of them in {named}: such are the scores of dead "
        "layers, of all layers before one that is initialized to zero (a head, say), "
        "and of squares below float32's range; another initialization, more samples, a "
        "warm-up, another criterion or leaving these parameters out may help, and "
        'ties="position" keeps the first of them'
    )
