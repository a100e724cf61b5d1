"""Counts of layers beside the weights that can be kept of them."""

from __future__ import annotations

from collections.abc import Mapping

from fisherprune.errors import FisherpruneError
from fisherprune.masks.counts import Counts


def counts_within(counts: Counts, room: Mapping[str, int], spare: int) -> Counts:
    """Return ``counts`` with no layer above its room, and the same number in all.

    From one round of pruning to the next the count of a layer may grow by one, where
    counts are rounded to their sum. Then it stays, and the first layers with room keep
    one more.

    Args:
        counts: weights kept of all together, or of each layer.
        room: number of weights that can be kept of each layer.
        spare: by how many a layer's count may be above its room.

    Raises:
        FisherpruneError: where a layer, or all of them, should keep more than that.
    """
    if isinstance(counts, int):
        _check_room("scores", counts, sum(room.values()), 0)
        return counts
    for name, count in counts.items():
        _check_room(f"scores of {name!r}", count, room[name], spare)
    fitted = {name: min(count, room[name]) for name, count in counts.items()}
    left = sum(counts.values()) - sum(fitted.values())
    _check_room("scores", sum(counts.values()), sum(room.values()), 0)
    while left:
        for name in [name for name, n in fitted.items() if n < room[name]][:left]:
            fitted[name] += 1
            left -= 1
    return fitted


def _check_room(what: str, count: int, room: int, spare: int) -> None:
    if count > room + spare:
        raise FisherpruneError(
            f"select_masks: among must leave {count} {what} to keep, got {room}"
        )
