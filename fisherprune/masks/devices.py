"""Selection over scores on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.masks.ties import refuse_ties, tie_ranks


def read_together(numbers: Sequence[Tensor]) -> list[int]:
    """Return the entries of 1-D tensors on any devices; the host waits once."""
    device = next((n.device for n in numbers if n.is_cuda), numbers[0].device)
    return torch.cat([n.to(device) for n in numbers]).tolist()


def select_over_devices(
    tensors: dict[str, Tensor], keep: int, ties: str = "position"
) -> dict[str, Tensor]:
    """Select over devices: their digit histograms are added, the scores stay put.

    The host waits for results when all devices have been given their work.
    """
    topk = torch.ops.fisherprune.global_topk
    nonfinite = read_together([topk([s], [])[2] for s in tensors.values()])
    ops.refuse_nonfinite(nonfinite, list(tensors.values()), list(tensors))
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
    low, high = tie_ranks(keep, sum(s.numel() for s in tensors.values()))
    before, behind = keep - left, keep - left + sum(map(int, equal.values()))
    if ties == "error" and before < low and high <= behind:
        refuse_ties([(tensors, keep, threshold)])
    masks = {}
    for name, scores in tensors.items():
        kept = min(int(equal[name]), left)
        masks[name] = ops.topk_masks([scores], threshold, [kept])[0]
        left -= kept
    return masks
