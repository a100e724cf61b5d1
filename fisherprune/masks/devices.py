"""Selection over scores on several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.masks.ties import refuse_ties, tie_ranks
from fisherprune.shards import (
    as_shard,
    count_true,
    counts_here,
    flat_places,
    is_shard,
    local,
    mesh_of,
    summed,
)


def read_together(numbers: Sequence[Tensor]) -> list[int]:
    """Return the entries of 1-D tensors on any devices; the host waits once."""
    device = next((n.device for n in numbers if n.is_cuda), numbers[0].device)
    return torch.cat([n.to(device) for n in numbers]).tolist()


def check_finite(
    tensors: Mapping[str, Tensor], room: Mapping[str, int] | None = None
) -> None:
    """Refuse NaN and infinities, in one pass over tensors on any devices.

    Of each tensor all entries but ``room``, where it is given, are known not to be
    finite.
    """
    mesh, topk = mesh_of(tensors.values()), torch.ops.fisherprune.global_topk
    found = [topk([local(s)], [])[2] * counts_here(s, mesh) for s in tensors.values()]
    device = next((n.device for n in found if n.is_cuda), found[0].device)
    every = summed(torch.cat([n.to(device) for n in found]), mesh)
    refuse_nonfinite(tensors, every.tolist(), room)


def refuse_nonfinite(
    tensors: Mapping[str, Tensor],
    found: Sequence[int],
    room: Mapping[str, int] | None = None,
) -> None:
    """Refuse the entries that are not finite where the op has found more than known."""
    known = [0 if room is None else t.numel() - room[n] for n, t in tensors.items()]
    bad = [n - out for n, out in zip(found, known, strict=True)]
    ops.refuse_nonfinite(bad, list(tensors.values()), list(tensors))


def select_over_devices(
    tensors: dict[str, Tensor],
    keep: int,
    ties: str = "position",
    room: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Select over devices: their digit histograms are added, the scores stay put.

    So it is over the ranks that hold shards of the tensors; each gets the masks of its
    own. The host waits for results when all devices have been given their work. Where
    ``room`` is given, all entries but so many of each tensor are -infinity.
    """
    check_finite(tensors, room)
    room = room or {name: s.numel() for name, s in tensors.items()}
    threshold, left = _threshold(tensors, keep)
    equal = count_true({name: s == threshold for name, s in tensors.items()})
    low, high = tie_ranks(keep, sum(room[name] for name in tensors))
    before, behind = keep - left, keep - left + sum(equal.values())
    if ties == "error" and before < low and high <= behind:
        refuse_ties([(tensors, keep, threshold)])
    masks = {}
    for name, scores in tensors.items():
        kept = min(equal[name], left)
        here = _first_here(scores, threshold, kept, equal[name])
        (mask,) = ops.topk_masks([local(scores)], threshold, [here])
        masks[name] = as_shard(mask, scores)
        left -= kept
    return masks


def _threshold(tensors: Mapping[str, Tensor], keep: int) -> tuple[float, int]:
    """Return the k-th largest value, and how many of its equals are kept."""
    mesh, key, left = mesh_of(tensors.values()), 0, keep
    for bits, digit in ((0, 11), (11, 11), (22, 10)):
        parts = [
            ops.topk_histogram([local(s)], key, bits, digit)
            for s in tensors.values()
            if counts_here(s, mesh)
        ]
        here = sum((part.cpu() for part in parts), torch.zeros(1 << digit).long())
        counts = summed(here, mesh).cpu()
        above = counts.flip(0).cumsum(0).flip(0)  # entries of this digit or larger
        chosen = int((above >= left).nonzero()[-1])
        left -= int(above[chosen] - counts[chosen])
        key = key << digit | chosen
    return ops.key_value(key), left


def _first_here(scores: Tensor, threshold: float, kept: int, equal: int) -> int:
    """Return how many of the first ``kept`` equal scores are in this rank's part.

    The first are those of the lowest flat index in the whole tensor.
    """
    if not is_shard(scores) or not kept:
        return kept
    if kept == equal:
        return scores.numel()
    flat = flat_places(local(scores) == threshold, scores)
    mesh = mesh_of([scores])
    counted, low, high = counts_here(scores, mesh), 0, scores.numel()
    while low < high:  # the first flat index with all that are kept below it
        middle = (low + high) // 2
        below = (flat < middle).sum() * counted
        if int(summed(below, mesh)) < kept:
            low = middle + 1
        else:
            high = middle
    return int((flat < low).sum())
