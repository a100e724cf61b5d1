"""How a pass over the batches runs: tapped, and sample by sample where need be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError, FisherpruneWarning
from fisherprune.parameters import Parameters, check_unhooked, device_of
from fisherprune.persample.calls import Key
from fisherprune.persample.contributions import Rows
from fisherprune.persample.kept import KeptLayers
from fisherprune.persample.rowwise_tap import RowwiseTap
from fisherprune.persample.tap import OWN_GRADIENTS, LayerTap, OwnGradientsError
from fisherprune.shards import local, split_as
from fisherprune.statistics.apart import (
    check_apart,
    check_reach,
    check_rows,
    check_untapped,
    run_alone,
)
from fisherprune.statistics.backward_apart import check_backward, few_of
from fisherprune.statistics.batches import Batch, backward, checked_batches, running
from fisherprune.statistics.forward import Forward, Ran
from fisherprune.statistics.graphs import GraphedBatches
from fisherprune.statistics.passes import Task
from fisherprune.statistics.protect import forgetting, versions_of
from fisherprune.statistics.ranks import no_samples
from fisherprune.statistics.rowwise import constants_of, may_be_rowwise, run_rowwise
from fisherprune.statistics.shards import in_layers
from fisherprune.statistics.sums import PerSampleSums, warn_of_loops
from fisherprune.statistics.tensor_parallel import any_rank, check_results, exchanged
from fisherprune.statistics.verdicts import Verdicts


@dataclass
class TappedBatch:
    """A batch whose forward pass was tapped.

    Attributes:
        ran: what came of it.
        size: its number of samples.
        first: number of samples before it.
        tap: that saw it.
        sums: to which it adds.
    """

    ran: Ran
    size: int
    first: int
    tap: LayerTap
    sums: PerSampleSums

    @property
    def result(self) -> Tensor:
        """Of the forward pass, samples first."""
        return self.ran.result

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Add the moments of the gradients of ``loss``, a sum over the samples."""
        both = self.sums.tapped, self.sums.looped
        active = both if not self.sums.loops else both[:1]
        for each in active:
            each.begin(self.size)
        with backward(self.tap.op):
            self.tap.backward(loss, again=again)
        for each in active:
            each.end()


@dataclass
class LoneSample:
    """A sample that was run alone; ``first`` is the number of those before it."""

    ran: Ran
    first: int
    sums: PerSampleSums
    weights: Parameters

    @property
    def result(self) -> Tensor:
        """Of the forward pass, samples first."""
        return self.ran.result

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Add the gradient of ``loss``, and its square."""
        looped = self.sums.looped
        wanted = {n: p for n, p in looped.parameters.items() if looped.wants(n)}
        grads = torch.autograd.grad(
            loss,
            [self.weights[name] for name in wanted],
            retain_graph=True,  # a part may be kept somewhere, and come again
            materialize_grads=True,
        )
        looped.begin(1)
        for name, grad in zip(wanted, grads, strict=True):
            part = local(split_as(grad, self.weights[name]))
            self.sums.add_looped(name, Rows(part.unsqueeze(0)))
        looped.end()


Step = Callable[[TappedBatch | LoneSample], None]


def tapped_passes(
    op: str, task: Task, forward: Forward, sums: PerSampleSums, step: Step | None = None
) -> Iterator[TappedBatch | LoneSample]:
    """Run the forward pass of each batch; the caller runs the backward pass.

    Args:
        op: named in errors.
        task: its model is within ``evaluating``, its parameters are watched.
        forward: from whose result the caller goes backward.
        sums: to which what is yielded adds.
        step: all that the caller does with what is yielded. With it, batches may run
            as graphs, which are not yielded.

    Raises:
        FisherpruneError: where there is no batch, samples mix, or a parameter is
            hooked.
    """
    with in_layers(task) as laid:
        sums.used = laid.used
        yield from _tapped_passes(op, laid, forward, sums, step)


def _tapped_passes(
    op: str, task: Task, forward: Forward, sums: PerSampleSums, step: Step | None
) -> Iterator[TappedBatch | LoneSample]:
    forward, verdicts = forgetting(task.model, forward), Verdicts()
    found = None if task.tensor_group else set[str]()  # ranks refuse the same
    run = _TappedRun(op, task, forward, sums, scattered=found)
    run.may_be_rowwise = may_be_rowwise(task)
    graphs = None
    if step and task.settings.cuda_graph:
        graphs = GraphedBatches(op, task, sums, run.run, step)
    for batch in batches_of(op, task):
        first = sums.samples
        sums.samples += batch.size
        if graphs and (conditions := graphs.replay(batch)) is not None:
            verdicts.expect(conditions)
            continue
        if sums.tapped.parameters and (tapped := run.tapped(batch)):
            verdicts.expect(tapped.ran.conditions)
            yield tapped
        if sums.loops:
            run.are_apart = run.are_apart or check_untapped(op, task, batch, forward)
            for i in range(batch.size):
                with running(op, batch):
                    ran = forward(task.model, batch.alone(i))
                verdicts.expect(ran.conditions)
                yield LoneSample(ran.of_first(), first + i, sums, task.used)
        if graphs:
            graphs.learn(batch)
    verdicts.settle()
    if task.part is None or not task.part.number:
        warn_of_loops(op, sums)
        if graphs:
            graphs.warn()


def tapped_batch(op: str, task: Task, forward: Forward, batch: Batch) -> TappedBatch:
    """Run a batch of at least two samples; its tap says what calls are known of.

    Raises:
        FisherpruneError: where samples mix.
    """
    forward = forgetting(task.model, forward)
    sums = PerSampleSums(task, 1)
    return _TappedRun(op, task, forward, sums, scattered=None).run(batch)


@dataclass
class _TappedRun:
    op: str
    task: Task
    forward: Forward
    sums: PerSampleSums
    known: dict[object, dict] = field(default_factory=dict)
    """What was found out about calls, by the shapes of a batch."""
    kept: KeptLayers = field(default_factory=KeptLayers)
    scattered: set[str] | None = field(default_factory=set)
    """Parameters whose calls have rows of any samples; None: such are refused."""
    compares_late: bool = True
    """Whether values are compared with those of a sample alone after the whole batch:
    so the device never waits; not where they were found to differ."""
    may_be_rowwise: bool = False
    """Whether the functions that are called may say that samples do not mix."""
    are_apart: bool = False
    """Whether it was seen that samples do not mix."""
    reached: set[object] = field(default_factory=set)
    """Shapes of batches of which it was seen whether gradients reach other samples."""
    has_compared: bool = False
    """Whether gradients were compared with those of samples alone."""
    changed: dict[str, str] = field(default_factory=dict)
    """Why the tap does not see a parameter's gradients, by its name."""

    def tapped(self, batch: Batch) -> TappedBatch | None:
        """Run a batch; None where no parameter's gradients are seen."""
        while self.sums.tapped.parameters:
            try:
                found = self.run(batch)
            except OwnGradientsError as error:
                self.sums.loop_over(dict.fromkeys(error.names, OWN_GRADIENTS))
                continue
            except _RefusedElsewhere as error:
                self.sums.loop_over(error.reasons)
                continue
            self.sums.loop_over(found.tap.refused)
            for name, ways in found.tap.ways.items():
                self.sums.ways[name] |= ways
            return found if self.sums.tapped.parameters else None
        return None

    def run(
        self, batch: Batch, sample: int = -1, made: frozenset[Key] = frozenset()
    ) -> TappedBatch:
        alone = known = few = None
        tapped = self.sums.tapped.parameters
        parameters = {n: p for n, p in self.task.used.items() if n in tapped}
        if batch.size > 1 and (known := self.known.get(batch.shapes)) is None:
            if self.may_be_rowwise:
                if found := self._rowwise(batch, parameters):
                    return found
                self.may_be_rowwise = False
            few = few_of(self.task, batch)
            # Before the batch, whose graph must not save what this one changes.
            alone = run_alone(
                *(self.op, self.task, parameters, batch, self.forward, sample, made),
                self.compares_late,
            )
        tap = LayerTap(
            parameters,
            batch.tensors,
            batch.size,
            self.sums.add,
            self.op,
            None if alone is None or isinstance(alone, Exception) else alone.records,
            known,
            self.sums.scaled,
            self.kept,
            self.scattered,
        )
        with running(self.op, batch), tap.forward():
            ran = self.forward(self.task.model, batch)
        if isinstance(alone, FisherpruneError):  # the whole batch runs
            raise alone
        if not self.known:
            check_results(self.op, self.task, ran.result)
        if alone:
            compared, self.are_apart = check_apart(self.op, alone, ran), True
            differs, has_alike, remade, is_unlike, is_unsure = any_rank(
                self.task,
                not compared.reads_same,
                compared.has_alike,
                tap.refused and tap.made - made,
                tap.finder.is_unlike,
                tap.finder.is_unsure,
            )
            if differs:
                self.compares_late = False
                return self.run(batch, sample, made)
            if remade:
                return self.run(batch, sample, made | tap.made)
            if is_unlike and sample:  # one that is padded, maybe
                return self.run(batch, 0, made)
            if not is_unsure:
                self.known[batch.shapes] = tap.known
        tap.prepare(ran.result)
        if self._agree(tap, alone and tap.must_check or batch.size > 1 and tap.moved):
            check_rows(tap, ran.result)
            if self.scattered is not None and tap.scattered > self.scattered:
                self.scattered |= tap.scattered
                return self.run(batch, sample, made)
            tap.prepare(ran.result)
            self._agree(tap)
        wanted = alone and (has_alike or few and not self.reached)
        if wanted and batch.shapes not in self.reached:
            self.reached.add(batch.shapes)
            run = self.op, self.task, self.forward, few or batch.last(3), tap
            before = versions_of(self.task.model)
            self.changed = check_reach(*run, ran.result) | self.changed
            if versions_of(self.task.model) != before:
                return self.run(batch, sample, made)  # whose graph saves what changed
            tap.refused = self.changed | tap.refused
            tap.prepare(ran.result)
            self._agree(tap)
        if few and tap.has_own_backward and not self.has_compared:
            self.has_compared = True
            run = self.op, self.task, self.forward, few, tap
            self.changed = check_backward(*run) | self.changed | tap.refused
            return self.run(batch, sample, made)  # whose graph saves what these changed
        if self.changed.keys() & parameters:
            tap.refused = self.changed | tap.refused
            tap.prepare(ran.result)
        return self._tapped_batch(ran, batch, tap)

    def _rowwise(self, batch: Batch, parameters: Parameters) -> TappedBatch | None:
        """Run a batch if the functions that are called keep its samples apart."""
        constants = constants_of(self.task, batch)
        if constants is None:
            return None
        tap = RowwiseTap(
            *(parameters, batch.tensors, batch.size, self.sums.add, self.op),
            balances=self.sums.scaled,
            kept=self.kept,
            scattered=self.scattered,
            constants=constants,
        )
        run = self.op, self.task, self.forward, batch, tap
        ran = run_rowwise(*run, tap.forward())
        if ran is None:
            return None
        self.known[batch.shapes], self.are_apart = tap.known, True
        tap.prepare(ran.result)
        return self._tapped_batch(ran, batch, tap)

    def _tapped_batch(self, ran: Ran, batch: Batch, tap: LayerTap) -> TappedBatch:
        first = self.sums.samples - batch.size
        return TappedBatch(ran, batch.size, first, tap, self.sums)

    def _agree(self, tap: LayerTap, flag: object = False) -> bool:
        """Return whether a rank that runs the model with this one has the flag set.

        Raises:
            _RefusedElsewhere: where they refuse other parameters: then gradients would
                reach other calls on each.
        """
        every = exchanged(self.task, (tap.refused, bool(flag)))
        if any(refused.keys() != tap.refused.keys() for refused, _ in every):
            raise _RefusedElsewhere({n: why for r, _ in every for n, why in r.items()})
        return any(each for _, each in every)


class _RefusedElsewhere(Exception):
    """Ranks of tensor parallelism differ in the parameters that they refuse."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def batches_of(op: str, task: Task) -> Iterator[Batch]:
    """Yield the batches of a task, at least one where no other rank may have some."""
    if task.process_group is None and not task.every_rank:
        _warn_of_ranks(op, task)
    check_unhooked(task.parameters)
    empty = True
    device, title = device_of(task.parameters), op if task.progress else ""
    labelled = task.losses is None
    for batch in checked_batches(task.batches, device, title, labelled=labelled):
        empty = False
        if task.part is not None:
            task.part.see(op, batch)
        yield batch
    if empty and task.process_group is None:
        raise no_samples(op)


def _warn_of_ranks(op: str, task: Task) -> None:
    """Warn where several processes of one job score: they do not add their data up."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    twins = 1 if task.tensor_group is None else task.tensor_group.size()
    if (ranks := distributed.get_world_size()) > twins:
        warnings.warn(
            f"{op}: each of the {ranks} ranks of torch.distributed scores its own "
            "batches, so their masks differ unless all ranks see the same data: give "
            "process_group (torch.distributed.group.WORLD), with which the batches of "
            "all ranks count",
            FisherpruneWarning,
            stacklevel=2,
        )
