"""Pruning in rounds: score, remove a part, score what is left, to the last sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherprune.errors import FieldError, shown
from fisherprune.masks.counts import keep_count
from fisherprune.masks.masks import Masks
from fisherprune.masks.plan import Plan
from fisherprune.parameters import Parameters
from fisherprune.scoring.criteria import Criterion
from fisherprune.shards import local
from fisherprune.statistics.passes import Task
from fisherprune.streams import stream_seed

SCHEDULES = ("exponential", "linear")
"""How the share of the weights that is kept falls from 1 to the last one's."""

Scorer = Callable[[Task, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Scores of a model whose pruned weights are zero, and of all its weights before."""


@dataclass(frozen=True)
class Rounds:
    r"""How many rounds there are, and what each keeps.

    With n weights, k of them kept in the end and T rounds, round t keeps
    :math:`n (k/n)^{t/T}` by the schedule "exponential" and :math:`n - (n - k)\,t/T` by
    "linear". The first is that of SynFlow, FORCE and Iterative SNIP.
    """

    count: int = 1
    schedule: str = "exponential"

    def sparsities(self, n: int, sparsity: float) -> list[float]:
        """Return the sparsity after each round; the last one is ``sparsity``."""
        share = max(1, keep_count(n, sparsity)) / max(1, n)
        parts = [t / self.count for t in range(1, self.count)]
        if self.schedule == "linear":
            kept = [1 - (1 - share) * part for part in parts]
        else:
            kept = [share**part for part in parts]
        return [1 - each for each in kept] + [sparsity]


def checked_rounds(rounds: int | None, schedule: str, criterion: Criterion) -> Rounds:
    """Return the rounds, as many as the criterion has by default where it is None.

    Raises:
        FisherpruneError: where the number is no whole one of at least 1, or there is no
            such schedule.
    """
    rounds = criterion.rounds if rounds is None else rounds
    whole = isinstance(rounds, int) and not isinstance(rounds, bool)
    if not whole or rounds < 1:
        raise FieldError("rounds", "a whole number of at least 1", shown(rounds))
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise FieldError("schedule", f"one of {SCHEDULES}", shown(schedule))
    return Rounds(rounds, schedule)


def select_in_rounds(
    task: Task,
    plan: Plan,
    sparsities: Sequence[float],
    rounds: Rounds,
    score: Scorer,
    *,
    regrow: bool = False,
    ties: str = "error",
) -> list[Masks]:
    """Return masks of several sparsities from one run of rounds to the highest.

    Masks of a lower sparsity come from the scores of the round in which the schedule
    gets there. The model's weights are put back in the end, also after an error.

    Args:
        task: what scores are found of.
        plan: how many weights are kept, and where scores compete.
        sparsities: fractions removed, checked.
        rounds: how many, and what each keeps.
        score: finds the scores in a round.
        regrow: whether weights that a round removed compete again in the next.
        ties: as in ``select_masks``, of the masks that are returned. On the way there
            position decides: weights without a gradient, as of taps that max-pooling
            leaves out, are equal, and go in one round or the next.
    """
    if rounds.count == 1:
        return plan.select(score(task, task.parameters), sparsities, ties)
    if isinstance(task.batches, Iterator):
        task = replace(task, batches=list(task.batches))
    size = sum(p.numel() for p in task.parameters.values())
    last, kept = -1.0, None
    found: dict[float, Masks] = {}
    with _pruned(task.parameters) as (dense, prune):
        for t, now in enumerate(rounds.sparsities(size, max(sparsities)), 1):
            due = sorted({s for s in sparsities if last < s <= now})
            scores = score(_in_round(task, t, kept), dense)
            among = None if regrow else kept
            if due:
                masks = plan.select(scores, due, ties, among)
                found |= zip(due, masks, strict=True)
            if now not in found:
                step, share = plan.step(now)
                found[now] = step.select(scores, share, "position", among)
            last, kept = now, found[now]
            prune(kept)
    return [found[s] for s in sparsities]


def _in_round(task: Task, t: int, kept: Masks | None) -> Task:
    """Return the task of a round, which draws random numbers of its own."""
    seed = task.seed if t == 1 else stream_seed(task.seed, f"round {t}")
    return replace(task, masks=kept, seed=seed)


@contextmanager
def _pruned(
    parameters: Parameters,
) -> Iterator[tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], None]]]:
    """Yield copies of the weights, and a function that sets pruned ones to zero."""
    dense = {name: p.detach().clone() for name, p in parameters.items()}

    def prune(masks: Mapping[str, Tensor]) -> None:
        for name, weight in dense.items():
            here = local(weight)
            mask = local(masks[name]).to(here.device)  # scores may be kept elsewhere
            pruned = torch.where(mask, here, here.new_zeros(()))
            local(parameters[name].data).copy_(pruned)

    try:
        yield dense, prune
    finally:
        for name, weight in dense.items():
            local(parameters[name].data).copy_(local(weight))
