"""Sums over groups of samples of a pass, of one kind of gradients or of several."""

from __future__ import annotations

from collections.abc import Mapping

from fisherprune.persample.contributions import Gradients
from fisherprune.shards import as_shard, local
from fisherprune.statistics.accumulators import Accumulators, Sums
from fisherprune.statistics.passes import LoopsError, Task
from fisherprune.statistics.ranks import add_up_, counted, gathered
from fisherprune.statistics.shards import part_of_all


class PerSampleSums:
    """Sums over groups of samples, and which way each parameter's gradients came.

    There may be several, each with accumulators of its own: what a backward pass finds
    is added to the one that was chosen.

    Attributes:
        samples: number of samples of the batches that were run.
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
        parameters = {name: local(p) for name, p in task.parameters.items()}
        self.scaled, self.samples = scaled, 0
        self._groups: int | None = None
        self._all = [
            (
                self.accumulators(parameters, group_size),
                self.accumulators({}, group_size),
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

    def choose(self, number: int) -> None:
        """From now on, add to the sums of that number."""
        self.tapped, self.looped = self._all[number]

    def add(self, name: str, gradients: Gradients) -> None:
        """Add per-sample gradients that the tap saw."""
        self.tapped.add(name, part_of_all(gradients, self.parameters[name]))

    def add_looped(self, name: str, gradients: Gradients) -> None:
        """Add the gradients of a sample that was run alone."""
        self.looped.add(name, part_of_all(gradients, self.parameters[name]))

    @property
    def groups(self) -> int:
        """Number of groups, a partial last one of each rank included."""
        if self._groups is not None:
            return self._groups
        return -(-self.samples // self.tapped.group_size)

    def add_ranks(self, op: str, task: Task) -> PerSampleSums:
        """Add what the other ranks of the task's group found; return itself.

        Raises:
            FisherpruneError: where another rank failed, or none has a sample.
        """
        if task.process_group is None:
            return self
        every = gathered(task, op, (self.samples, self.groups, self.ways, self.reasons))
        samples, groups = counted(op, [each[:2] for each in every])
        self.samples, self._groups = int(samples), int(groups)
        for _, _, ways, reasons in every:
            self.reasons |= reasons
            for name, more in ways.items():
                self.ways[name] |= more
        for number in range(len(self._all)):
            for sums in self.sums_of(number):
                add_up_(task, [*sums.values()])
        return self

    def loop_over(self, reasons: Mapping[str, str]) -> None:
        """From now on, run samples one by one for these parameters."""
        for name in sorted(reasons):
            if name in self.tapped.parameters:
                if not self.may_loop:
                    raise LoopsError
                for tapped, looped in self._all:
                    tapped.hand_over(name, looped)
                self.reasons[name] = reasons[name]

    def sums(self) -> tuple[Sums, Sums]:
        """Close the last groups; return the sums over groups of means and squares.

        Where there are several, they are added up.
        """
        sums, squares = self.sums_of(0)
        for number in range(1, len(self._all)):
            more, more_squares = self.sums_of(number)
            sums = {n: sum + more[n] for n, sum in sums.items()}
            squares = {n: sum + more_squares[n] for n, sum in squares.items()}
        return sums, squares

    def sums_of(self, number: int) -> tuple[Sums, Sums]:
        """Return the same of the sums of one number."""
        tapped, looped = self._all[number]
        sums, squares = tapped.sums()
        more_sums, more_squares = looped.sums()
        sums, squares = sums | more_sums, squares | more_squares
        named = self.parameters.items()
        return (
            {n: as_shard(sums[n], p) for n, p in named},
            {n: as_shard(squares[n], p) for n, p in named},
        )
