"""Masks beside others of the same parameters, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.masks.checks import checked_masks
from fisherprune.parameters import fitted_names
from fisherprune.shards import as_shard, count_true, is_shard, local, split_like


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
        pairs[name] = mask, split_like(theirs, mask, f"{where}: masks of {name!r}")
    return pairs


def is_same_in_shards(
    masks: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> bool:
    """Return whether masks of the same names are equal, on all ranks together."""
    pairs = {n: (m, others[n]) for n, m in masks.items()}
    if any(mine.shape != other.shape for mine, other in pairs.values()):
        return False
    different = {}
    for name, (mine, other) in pairs.items():
        mine = mine if is_shard(mine) else split_like(mine, other, "masks")
        other = split_like(other, mine, "masks")
        different[name] = as_shard(local(mine) ^ local(other), mine)
    return not any(count_true(different).values())


def overlaps(masks: Mapping[str, Tensor], other: object) -> dict[str, tuple[int, int]]:
    """Count the weights that both keep, and those that either keeps, by name."""
    pairs = paired(masks, other, "jaccard").items()
    return {name: (count(a & b), count(a | b)) for name, (a, b) in pairs}


def count(mask: Tensor) -> int:
    """Return how many weights a mask keeps; of one in shards all ranks ask for it."""
    return count_true({"": mask})[""]


def share(part: int, whole: int) -> float:
    """Return the fraction ``part / whole``; 1 of nothing."""
    return part / whole if whole else 1.0
