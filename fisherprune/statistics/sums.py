"""Sums over groups of samples of a pass, of one kind of gradients or of several."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from fisherprune.errors import FisherpruneWarning
from fisherprune.persample.contributions import Gradients
from fisherprune.shards import as_shard, local
from fisherprune.statistics.accumulators import Accumulators, Sums
from fisherprune.statistics.parts import in_order
from fisherprune.statistics.passes import LoopsError, Task
from fisherprune.statistics.ranks import add_up_, counted, gathered
from fisherprune.statistics.shards import part_of_all
from fisherprune.statistics.store import final_store, first_store
from fisherprune.statistics.tensor_parallel import copy_replicated_


@dataclass(frozen=True)
class Summed:
    """What a pass summed up.

    Attributes:
        sums: over groups of their mean gradients, by parameter name.
        squares: over groups of the squares of these.
        samples: that were seen, by all ranks.
        groups: of these.
        paths: by parameter, the ways of its gradients, as ``GradientMoments.paths``.
        apart: the squares of each of several sums, where they are asked for.
    """

    sums: Sums
    squares: Sums
    samples: int
    groups: int
    paths: dict[str, tuple[str, ...]]
    apart: Sequence[Sums] = ()

    @classmethod
    def of_parts(cls, task: Task, parts: Sequence[Summed]) -> Summed:
        """Return what passes for parts of the parameters summed up together."""
        first, *others = parts
        if not others:
            return first
        sums = in_order(task, [each.sums for each in parts])
        squares = in_order(task, [each.squares for each in parts])
        return cls(sums, squares, first.samples, first.groups, first.paths)


class PerSampleSums:
    """Sums over groups of samples, and which way each parameter's gradients came.

    There may be several, each with accumulators of its own: what a backward pass finds
    is added to the one that was chosen.

    Attributes:
        samples: number of samples of the batches that were run.
        used: what the model's forward pass uses in the place of parameters.
        tapped: of the chosen sums, for parameters whose gradients the tap sees.
        looped: for the others.
        ways: by parameter the functions by whose rules its gradients are found, and
            "vmap" where a function was differentiated for each sample.
        reasons: why the whole model was, of the parameters where that was so.
        scaled: whether the losses are times a power of two.
    """

    accumulators: type[Accumulators] = Accumulators

    def __init__(
        self, task: Task, group_size: int, scaled: bool = False, several: int = 1
    ) -> None:
        self.parameters, self.may_loop = task.parameters, task.may_loop
        self.used = task.used
        parameters = {name: local(p) for name, p in task.parameters.items()}
        self.scaled, self.samples = scaled, 0
        self._groups: int | None = None
        only = task.part.names if task.part else None
        store, self._settings = first_store(task.settings), task.settings
        self._all = [
            (
                self.accumulators(parameters, group_size, only, store),
                self.accumulators({}, group_size, only, store),
            )
            for _ in range(several)
        ]
        self.choose(0)
        self.ways: dict[str, set[str]] = {name: set() for name in parameters}
        self.reasons: dict[str, str] = {}

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """Return the ways by parameter; that of a looped one is one."""
        return {
            name: ("loop",) if name in self.reasons else tuple(sorted(ways))
            for name, ways in self.ways.items()
        }

    @property
    def loops(self) -> bool:
        """Return whether the model runs sample by sample for what is summed up."""
        return any(map(self.looped.wants, self.looped.parameters))

    def choose(self, number: int) -> None:
        """From now on, add to the sums of that number."""
        self.tapped, self.looped = self._all[number]

    @contextmanager
    def instead(self, tapped: Accumulators) -> Iterator[None]:
        """Inside, add what the tap sees to other accumulators; of one kind of sums."""
        (kept,) = self._all
        self._all = [(tapped, self.accumulators({}, tapped.group_size))]
        self.choose(0)
        try:
            yield
        finally:
            self._all = [kept]
            self.choose(0)

    def advance(self, twin: Accumulators) -> None:
        """Count samples that are added as they were to a twin of ``tapped``."""
        self.tapped.advance(twin)
        self.looped.advance(twin)

    def add(self, name: str, gradients: Gradients) -> None:
        """Add per-sample gradients that the tap saw."""
        self.tapped.add(name, self._part(name, gradients))

    def add_looped(self, name: str, gradients: Gradients) -> None:
        """Add the gradients of a sample that was run alone."""
        self.looped.add(name, self._part(name, gradients))

    def _part(self, name: str, gradients: Gradients) -> Gradients:
        return part_of_all(gradients, self.parameters[name], self.used[name])

    @property
    def groups(self) -> int:
        """Number of groups, a partial last one of each rank included."""
        if self._groups is not None:
            return self._groups
        return -(-self.samples // self.tapped.group_size)

    def add_ranks(self, op: str, task: Task) -> PerSampleSums:
        """Add what the other ranks of the task's group found; return itself.

        Raises:
            FisherpruneError: where another rank failed, none has a sample, or ranks of
                tensor parallelism have other gradients of what they all have.
        """
        if task.process_group is not None:
            self._count_ranks(op, task)
        for number in range(len(self._all)):
            for sums in self.sums_of(number):
                add_up_(task, [local(t) for t in sums.values()])
                copy_replicated_(task, sums)
        return self

    def _count_ranks(self, op: str, task: Task) -> None:
        every = gathered(task, op, (self.samples, self.groups, self.ways, self.reasons))
        samples, groups = counted(op, [each[:2] for each in every])
        self.samples, self._groups = int(samples), int(groups)
        for _, _, ways, reasons in every:
            self.reasons |= reasons
            for name, more in ways.items():
                self.ways[name] |= more

    def loop_over(self, reasons: Mapping[str, str]) -> None:
        """From now on, run samples one by one for these parameters."""
        for name in sorted(reasons):
            if name in self.tapped.parameters:
                if not self.may_loop:
                    raise LoopsError
                for tapped, looped in self._all:
                    tapped.hand_over(name, looped)
                self.reasons[name] = reasons[name]

    def summed(self, apart: bool = False) -> Summed:
        """Close the last groups; return what there is, kept where settings say.

        What is kept elsewhere is forgotten here: taps, which refer to these sums, may
        live longer.
        """
        counts = self.samples, self.groups, self.paths
        every = [self.sums_of(number) for number in range(len(self._all))]
        sums, squares = self.joined(every)
        if first_store(self._settings) != (store := final_store(self._settings)):
            sums = {name: store.keep(each) for name, each in sums.items()}
            squares = {name: store.keep(each) for name, each in squares.items()}
            for each in (each for pair in self._all for each in pair):
                each.forget()
        parts = [squares for _, squares in every] if apart else []
        return Summed(sums, squares, *counts, parts)

    def joined(self, every: Sequence[tuple[Sums, Sums]]) -> tuple[Sums, Sums]:
        """Return the sums over groups of means and squares, of all sums together."""
        sums, squares = every[0]
        for more, more_squares in every[1:]:
            sums = {n: sum + more[n] for n, sum in sums.items()}
            squares = {n: sum + more_squares[n] for n, sum in squares.items()}
        return sums, squares

    def sums_of(self, number: int) -> tuple[Sums, Sums]:
        """Return the sums of one number; those over groups of means and squares."""
        tapped, looped = self._all[number]
        sums, squares = tapped.sums()
        more_sums, more_squares = looped.sums()
        sums, squares = sums | more_sums, squares | more_squares
        names = [name for name in self.ways if name in sums]
        return (
            {n: as_shard(sums[n], self.parameters[n]) for n in names},
            {n: as_shard(squares[n], self.parameters[n]) for n in names},
        )


def warn_of_loops(op: str, sums: PerSampleSums) -> None:
    """Warn of parameters for which the model ran sample by sample."""
    if not sums.reasons:
        return
    first, *others = (f"{n!r} ({why})" for n, why in islice(sums.reasons.items(), 3))
    left = len(sums.reasons) - 1 - len(others)
    named = ", ".join([first, *others]) + (f" and {left} more" if left else "")
    warnings.warn(
        f"{op}: the model ran once more for each sample alone, slowly but exactly, "
        f"for the gradients of {named}",
        FisherpruneWarning,
        stacklevel=2,
    )
