"""The largest of scores that compete, over all layers or in each of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherprune.masks.counts import Counts
from fisherprune.masks.devices import (
    read_together,
    refuse_nonfinite,
    select_over_devices,
)
from fisherprune.masks.ties import refuse_ties, tie_ranks
from fisherprune.shards import any_shard, as_shard, count_true, local


class Contest(NamedTuple):
    """Scores that compete.

    Attributes:
        tensors: float32 by parameter name, -infinity where an entry can't be kept.
        room: number of entries that can be kept of each tensor.
    """

    tensors: dict[str, Tensor]
    room: Mapping[str, int]

    @classmethod
    def of(
        cls,
        scores: dict[str, Tensor],
        among: Mapping[str, Tensor] | None,
        room: Mapping[str, int],
    ) -> Contest:
        """Return the contest of the entries of ``among``; None: of all."""
        if among is None:
            return cls(scores, {name: s.numel() for name, s in scores.items()})
        inside = {
            n: as_shard(torch.where(local(among[n]), local(s), -math.inf), s)
            for n, s in scores.items()
        }
        return cls(inside, room)

    def only(self, names: Collection[str]) -> Contest:
        """Return the contest of some of the tensors."""
        return Contest({n: t for n, t in self.tensors.items() if n in names}, self.room)


def keep_largest(
    contest: Contest, counts: Sequence[Counts], least: Mapping[str, int], ties: str
) -> list[dict[str, Tensor]]:
    """Return masks of the largest scores, as many as each of ``counts`` says.

    Args:
        contest: the scores.
        counts: all of one kind: of all tensors together, or of each.
        least: entries that each tensor keeps at least where all compete: its own best
            so many are kept, and the others compete for what is left.
        ties: "error" or "position".

    Raises:
        FisherpruneError: where a score is NaN or infinite, or scores do not decide.
    """
    together = [count for count in counts if isinstance(count, int)]
    by_layer = [count for count in counts if not isinstance(count, int)]
    if by_layer:
        return _apart(contest, by_layer, ties)
    if any(least.values()):
        return [_above_least(contest, keep, least, ties) for keep in together]
    return _together(contest, together, ties)


def _above_least(
    contest: Contest, keep: int, least: Mapping[str, int], ties: str
) -> dict[str, Tensor]:
    """Keep the largest of all, but in no tensor less than ``least``.

    A tensor of which the threshold of all leaves less keeps exactly that many, and the
    others compete for the rest: again, until there is no such tensor.
    """
    rest, short, left = contest, list[str](), keep
    while True:
        (masks,) = _together(rest, [left], "position")
        found = [n for n, count in count_true(masks).items() if count < least[n]]
        if not found:
            break
        short += found
        left = keep - sum(least[name] for name in short)
        rest = contest.only(contest.tensors.keys() - short)
    (masks,) = _together(rest, [left], ties)
    if short:
        masks |= _apart(contest.only(short), [least], ties)[0]
    return {name: masks[name] for name in contest.tensors}


def _apart(
    contest: Contest, counts: Sequence[Mapping[str, int]], ties: str
) -> list[dict[str, Tensor]]:
    """Keep the largest of each tensor."""
    tensors, room = contest
    if any_shard(tensors.values()):
        return [
            {
                name: select_over_devices({name: t}, count[name], ties, room)[name]
                for name, t in tensors.items()
            }
            for count in counts
        ]
    found = [
        _Found.among(contest.only([name]), [count[name] for count in counts], ties)
        for name in contest.tensors
    ]
    return _checked(found, len(counts))


def _together(
    contest: Contest, keep: Sequence[int], ties: str
) -> list[dict[str, Tensor]]:
    """Keep the largest of all tensors."""
    tensors, room = contest
    if len({t.device for t in tensors.values()}) > 1 or any_shard(tensors.values()):
        return [select_over_devices(tensors, k, ties, room) for k in keep]
    return _checked([_Found.among(contest, keep, ties)], len(keep))


class _Found(NamedTuple):
    """What the op ``global_topk`` found in scores that compete, on one device."""

    contest: Contest
    keep: Sequence[int]
    masks: list[Tensor]
    thresholds: Tensor
    nonfinite: Tensor

    @classmethod
    def among(cls, contest: Contest, keep: Sequence[int], ties: str) -> _Found:
        """Call the op; where ties matter, with two ranks for each k."""
        total = sum(contest.room[name] for name in contest.tensors)
        pairs = [tie_ranks(k, total) for k in keep] if ties == "error" else []
        ranks = [rank for pair in pairs for rank in pair]
        topk = torch.ops.fisherprune.global_topk
        found = topk(list(contest.tensors.values()), list(keep), ranks)
        return cls(contest, keep, *found)

    def masks_of(self, i: int) -> dict[str, Tensor]:
        """Return the masks of the i-th k."""
        names, n = self.contest.tensors, len(self.contest.tensors)
        return dict(zip(names, self.masks[i * n : (i + 1) * n], strict=True))

    def undecided(self) -> Tensor:
        """Return for each k whether ties decide: whether its ranks are one number."""
        low, high = self.thresholds[len(self.keep) :].view(-1, 2).unbind(1)
        return (low == high) & low.isfinite()


def _checked(found: list[_Found], several: int) -> list[dict[str, Tensor]]:
    """Refuse NaN, infinities and ties; the host waits for the devices once."""
    numbers = read_together(
        [*(one.nonfinite for one in found), *(one.undecided() for one in found)]
    )
    for one in found:
        size = len(one.contest.tensors)
        refuse_nonfinite(one.contest.tensors, numbers[:size], one.contest.room)
        numbers = numbers[size:]
    for i in range(len(numbers) // len(found)):  # for each of found, of all its k
        flags_of = numbers[i :: len(found[0].keep)]
        tied = [one for one, flag in zip(found, flags_of, strict=True) if flag]
        if tied:
            refuse_ties(
                [
                    (one.contest.tensors, one.keep[i], float(one.thresholds[i]))
                    for one in tied
                ]
            )
    return [
        {name: mask for one in found for name, mask in one.masks_of(i).items()}
        for i in range(several)
    ]
