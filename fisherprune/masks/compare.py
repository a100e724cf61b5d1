"""Masks beside others of the same parameters, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.masks.checks import checked_masks
from fisherprune.masks.devices import read_together
from fisherprune.parameters import fitted_names


def paired(
    masks: Mapping[str, Tensor], other: object, where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair masks with others of the same parameters, by name, on their own device.

    Raises:
        FisherpruneError: where ``other`` holds no masks, or its masks are of other
            parameters or shapes; the message begins with ``where``.
    """
    others = checked_masks(other, where)
    names = fitted_names(masks, others)
    if names is None or len(masks) != len(others):
        odd = sorted(set(masks) ^ set(others))
        raise FisherpruneError(
            f"{where}: masks must be of the same parameters, {odd[0]!r} is in one "
            "of them alone"
        )
    pairs = {}
    for name, mask in masks.items():
        theirs = others[names[name]]
        if mask.shape != theirs.shape:
            raise FisherpruneError(
                f"{where}: masks of {name!r} must have one shape, got "
                f"{list(mask.shape)} and {list(theirs.shape)}"
            )
        pairs[name] = mask, theirs.to(mask.device)
    return pairs


def overlaps(masks: Mapping[str, Tensor], other: object) -> dict[str, tuple[int, int]]:
    """Count the weights that both keep, and those that either keeps, by name."""
    pairs = paired(masks, other, "jaccard").items()
    return {name: (count(a & b), count(a | b)) for name, (a, b) in pairs}


def count(mask: Tensor) -> int:
    """Return how many weights a mask keeps."""
    return int(torch.count_nonzero(mask))  # sum first widens every bool to an int64


def share(part: int, whole: int) -> float:
    """Return the fraction ``part / whole``; 1 of nothing."""
    return part / whole if whole else 1.0


def count_each(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many weights each mask keeps; the host waits once."""
    counts = read_together([torch.count_nonzero(m)[None] for m in masks.values()])
    return dict(zip(masks, counts, strict=True))
