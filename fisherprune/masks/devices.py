"""Selection over scores on several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.masks.ties import refuse_ties, tie_ranks


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
    topk = torch.ops.fisherprune.global_topk
    found = read_together([topk([s], [])[2] for s in tensors.values()])
    refuse_nonfinite(tensors, found, room)


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

    The host waits for results when all devices have been given their work. Where
    ``room`` is given, all entries but so many of each tensor are -infinity.
    """
    check_finite(tensors, room)
    room = room or {name: s.numel() for name, s in tensors.items()}
    key, left = 0, keep
    for bits, digit in ((0, 11), (11, 11), (22, 10)):
        parts = [ops.topk_histogram([s], key, bits, digit) for s in tensors.values()]
        counts = torch.stack([part.cpu() for part in parts]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # entries of this digit or larger
        chosen = int((above >= left).nonzero()[-1])
        left -= int(above[chosen] - counts[chosen])
        key = key << digit | chosen
    threshold = ops.key_value(key)
    equal = {name: torch.count_nonzero(s == threshold) for name, s in tensors.items()}
    low, high = tie_ranks(keep, sum(room[name] for name in tensors))
    before, behind = keep - left, keep - left + sum(map(int, equal.values()))
    if ties == "error" and before < low and high <= behind:
        refuse_ties([(tensors, keep, threshold)])
    masks = {}
    for name, scores in tensors.items():
        kept = min(int(equal[name]), left)
        masks[name] = ops.topk_masks([scores], threshold, [kept])[0]
        left -= kept
    return masks
