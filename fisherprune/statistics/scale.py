"""Powers of two that bring squares of gradients into the range of float32.

Gradients below 1e-19 have squares that float32 can't hold, those above 1e19 too. Then a
pass runs again with its losses times a power of two, which changes no digit of a
gradient, and the exponent goes with the sums.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneWarning
from fisherprune.parameters import check_finite
from fisherprune.shards import largest

if TYPE_CHECKING:
    from fisherprune.statistics.batches import Batches
    from fisherprune.statistics.sums import Summed

Named = Mapping[str, Tensor]

CENTER = 40
"""Exponent of the largest gradient of a scaled pass: 103 below can still be squared."""
LEAP = 104
"""From where all squares are zero or infinite to where some are in range."""
LEAST = 2.0**-102
"""Of a parameter's largest square; below it, smaller ones have lost digits."""
ENOUGH = 2.0**-60
"""Of the largest square of all: gradients 1e10 times smaller still have theirs."""

READ_ONCE = (
    "give batches that can be read again, as a list or a DataLoader can, or scale the "
    "loss up"
)
TOO_WIDE = (
    "others are too much larger, or float16 overflows: pass over these parameters "
    "alone, or in a wider dtype"
)


def in_range(
    op: str, what: str, batches: Batches, run: Callable[[int], Summed]
) -> tuple[Summed, int]:
    """Run a pass, and again with its losses scaled where squares leave float32's range.

    Args:
        op: named in a warning, where squares stay too small.
        what: named in an error, where squares are not finite.
        batches: of the pass; an iterator can't be read again.
        run: the pass, of the exponent of its losses' factor.

    Returns:
        What it summed up, and the exponent of its losses' factor: 0 for ordinary
        networks.

    Raises:
        FisherpruneError: where squares are not finite.
    """
    found, exponent = run(0), 0
    tops = largest(found.squares)  # read once for all that follows
    for _ in range(2):
        other = _better(found.sums, tops, exponent)
        if other == exponent or isinstance(batches, Iterator):
            break
        again = run(other)
        now = largest(again.squares)
        if _are_finite(tops) and not _are_finite(now):
            break  # float16 within the model
        found, tops, exponent = again, now, other
    if not _are_finite(tops):
        check_finite(found.squares, what)
    once = isinstance(batches, Iterator)  # where squares are finite, so are the sums
    warn_of_lost(op, _lost(found.sums, tops), READ_ONCE if once else TOO_WIDE)
    return found, exponent


def _better(sums: Named, tops: Mapping[str, float], exponent: int) -> int:
    """Return the exponent with which the squares would be in range.

    Args:
        sums: of mean gradients.
        tops: the largest square of each parameter.
        exponent: with which they were found.
    """
    if not _are_finite(tops):
        return exponent if exponent < 0 else exponent - LEAP
    top = max(tops.values())
    all_well = not _lost(sums, tops)
    if all_well and (exponent or not 0 < top < ENOUGH):
        return exponent
    if not top:
        return exponent if exponent > 0 else exponent + LEAP
    away = CENTER - math.frexp(top)[1] // 2
    return exponent + away if abs(away) > 8 else exponent


def lost(sums: Named, squares: Named) -> list[str]:
    """Return the names of parameters that have gradients, but squares out of range."""
    return _lost(sums, largest(squares))


def _lost(sums: Named, tops: Mapping[str, float]) -> list[str]:
    small = [name for name, top in tops.items() if top < LEAST]
    sizes = largest({name: sums[name] for name in small}, absolute=True)
    return [name for name, size in sizes.items() if size]


def warn_of_lost(op: str, names: list[str], remedy: str) -> None:
    """Warn of parameters whose squares are zero though their gradients are not."""
    if names:
        first = ", ".join(repr(name) for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{op}: the squared gradients of {first}{more} are so small that float32 "
            f"holds zero, or few digits, though the gradients are not zero: {remedy}",
            FisherpruneWarning,
            stacklevel=2,
        )


def scaled(loss: Tensor, exponent: int) -> Tensor:
    """Return a loss times ``2**exponent``, whose gradients are those, exactly."""
    if not exponent:
        return loss
    half = exponent // 2  # the factor itself may be out of range
    return loss * 2.0**half * 2.0 ** (exponent - half)


@torch.inference_mode(False)  # autograd may save what is not made in inference mode
def shifted(tensors: Named, exponent: int) -> dict[str, Tensor]:
    """Return float32 tensors times ``2**exponent``, rounded where they leave range."""
    if not exponent:
        return dict(tensors)
    return {n: (t.double() * 2.0**exponent).float() for n, t in tensors.items()}


def _are_finite(tops: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, tops.values()))
