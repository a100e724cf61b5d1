"""Batches of a pass as one graph, which a GPU runs without Python in between.

A batch of a network has hundreds of functions, and Python takes longer to call them
than a fast GPU to run them. Here a batch is recorded once, and each further one of the
same shapes is copied to where the first one was, and done again. Functions, their order
and their memory are the same, so sums are, too: Python is what is left out. So what it
does beside is done here: counts of samples and blocks, conditions and their errors.

A graph is recorded after the second batch of its shapes. In the third one its sums are
compared with those of the batch run without it. Where that fails, or something can't be
recorded, all goes on without.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError, FisherpruneWarning
from fisherprune.parameters import device_of
from fisherprune.shards import any_shard
from fisherprune.statistics.accumulators import Accumulators, Forgetful
from fisherprune.statistics.apart import tolerance_of
from fisherprune.statistics.batches import Batch, reason
from fisherprune.statistics.blocks import BLOCK
from fisherprune.statistics.passes import Task
from fisherprune.statistics.recording import RECORDERS, Recorder, UnfitError, Watch
from fisherprune.statistics.store import BESIDE, first_store
from fisherprune.statistics.structure import map_tensors, named_values, tensors_in
from fisherprune.statistics.sums import PerSampleSums
from fisherprune.statistics.verdicts import Condition

if TYPE_CHECKING:
    from fisherprune.statistics.driver import TappedBatch

PLAIN = bool | int | float | str | None
"""Values that are compared where Python may decide by them."""
MOST_KINDS = 100
"""Kinds of batches that run without a graph before it is given up."""
UNLIKE = "no batch is like another, of the same shapes and numbers"


@dataclass
class _Graph:
    recorder: Recorder
    batch: Batch
    """Whose tensors it reads."""
    signature: object
    """Of batches that it can run."""
    state: object
    """Of the model that it reads."""
    twin: Accumulators
    """Which counted what it adds."""
    conditions: list[Condition]
    """Whose verdicts it writes."""
    watch: Watch
    """Which keeps the memory that it reads."""
    is_right: bool = False

    def run(self, batch: Batch) -> None:
        pairs = zip(
            tensors_in(self.batch.content), tensors_in(batch.content), strict=True
        )
        for own, other in pairs:
            own.copy_(other)
        self.recorder.replay()


class GraphedBatches:
    """Runs batches as a graph: all that a pass does with one between its batches.

    Args:
        op: named in errors.
        task: of the pass.
        sums: to which batches add.
        tap: runs the forward pass of a batch whose calls are known.
        step: runs its backward pass.
    """

    def __init__(
        self,
        op: str,
        task: Task,
        sums: PerSampleSums,
        tap: Callable[[Batch], TappedBatch],
        step: Callable[[TappedBatch], None],
    ) -> None:
        self.op, self.task, self.sums = op, task, sums
        self.tap, self.step = tap, step
        self.reason = self._why_never()
        self._graph: _Graph | None = None
        self._seen = set[object]()  # signatures of batches that ran without
        self._before: object = None  # the model's state before the last of them

    def replay(self, batch: Batch) -> list[Condition] | None:
        """Run a batch as a graph; None where it has to run without, and be learnt."""
        if self.reason:
            return None
        self._before, graph = self._state(), self._graph
        if graph is None or _signature(batch) != graph.signature:
            return None
        if self.sums.tapped.samples % self.task.group_size:
            return None  # a smaller batch came before, and its last group is open
        if not graph.is_right and not self._works(self._compare, batch):
            return None
        if self._before != graph.state or self.sums.looped.parameters:
            self.reason = "the model is not what it was when a batch was recorded"
            return None
        self.sums.advance(graph.twin)
        graph.run(batch)
        return [
            Condition(each.holds, partial(self._error, batch, i))
            for i, each in enumerate(graph.conditions)
        ]

    def learn(self, batch: Batch) -> None:
        """See a batch that ran without a graph, and record it where one like it did."""
        if self.reason or self._graph:
            return
        signature = _signature(batch)
        if signature in self._seen:
            self._works(self._record, batch)
        self._seen.add(signature)
        if len(self._seen) == MOST_KINDS:
            self.reason = UNLIKE

    def warn(self) -> None:
        """Say why batches ran without a graph, if they did and were enough for one."""
        if not self._graph and not self.reason and len(self._seen) > 2:
            self.reason = UNLIKE
        if self.reason:
            warnings.warn(
                f"{self.op}: cuda_graph: batches ran without a graph, as ever: "
                f"{self.reason}",
                FisherpruneWarning,
                stacklevel=2,
            )

    def _why_never(self) -> str:
        task, device = self.task, device_of(self.task.parameters)
        every = chain(task.model.parameters(), task.model.buffers())
        if device.type not in RECORDERS:
            return f"the model must be on {' or '.join(RECORDERS)}, got {device.type}"
        if any(tensor.device != device for tensor in every):
            return "the model is on several devices"
        if task.tensor_group is not None or any_shard(task.parameters.values()):
            return "parameters are in shards"
        if first_store(task.settings) != BESIDE:
            return "sums are kept elsewhere"
        if task.group_size > BLOCK:
            return f"groups have more than {BLOCK} samples"
        return ""

    def _works(self, action: Callable[[Batch], None], batch: Batch) -> bool:
        """Return whether an action works; if not, go on without graphs."""
        try:
            action(batch)
        except Exception as error:  # whatever it is, batches can run without
            self.reason, self._graph = reason(error), None
        if self.reason:
            gc.collect()  # taps refer to each other, and to a batch's activations
        return not self.reason

    def _record(self, batch: Batch) -> None:
        if self.sums.looped.parameters:
            raise UnfitError("the model runs once more for each sample alone")
        if self._state() != self._before:
            raise UnfitError(
                "a forward pass changes attributes or buffers of the model"
            )
        if batch.size % self.task.group_size:
            raise UnfitError("groups run on from batch to batch")
        device, own = device_of(self.task.parameters), _copied(batch)
        recorder, tapped = RECORDERS[device.type](device), self.sums.tapped
        forgetful = Forgetful(tapped.parameters, tapped.group_size, tapped.only)
        with self.sums.instead(forgetful), Watch() as watch, recorder.warming_up():
            self._run(own)
            if watch.reason:
                raise UnfitError(watch.reason)
        twin = tapped.twin()
        with self.sums.instead(twin), Watch() as watch, recorder.recording():
            ran = self._run(replace(own)).ran  # which the first run may have changed
        facts = _signature(batch), self._state(), twin, [*ran.conditions], watch
        self._graph = _Graph(recorder, own, *facts)

    def _compare(self, batch: Batch) -> None:
        """Compare a graph's sums of a batch with those that it has without."""
        assert self._graph
        tapped, expected = self.sums.tapped, self.sums.tapped.fresh()
        with self.sums.instead(expected):
            ran = self._run(_copied(batch)).ran
        before = [tensor.clone() for tensor in tapped.tensors]
        try:
            for tensor in tapped.tensors:
                tensor.zero_()
            self._graph.run(batch)
            outputs = ran.result if ran.outputs is None else ran.outputs
            if not _are_close(tapped.values, expected.values, tolerance_of(outputs)):
                raise UnfitError("a graph finds other sums of another batch")
        finally:
            for tensor, was in zip(tapped.tensors, before, strict=True):
                tensor.copy_(was)
        self._graph.is_right = True

    def _run(self, batch: Batch) -> TappedBatch:
        found = self.tap(batch)
        if found.tap.refused:
            raise UnfitError("gradients come another way than in the batch before")
        self.step(found)
        return found

    def _error(self, batch: Batch, number: int) -> Exception:
        """Return the error of a condition, which says of what sample it is."""
        condition = self.tap(_copied(batch)).ran.conditions[number]
        if not condition.holds:
            return condition.error()
        return FisherpruneError(
            f"{self.op}: cuda_graph must be False for this model: labels or losses of "
            f"batch {batch.index} can be used without a graph, but not with it"
        )

    def _state(self) -> object:
        """Return where the model's tensors are, their versions, and what is plain."""
        model = self.task.model
        every = chain(model.parameters(), model.buffers())
        tensors = [(t.data_ptr(), _version(t)) for t in every]
        own = (value for m in model.modules() for value in vars(m).values())
        return tensors, [value for value in own if isinstance(value, PLAIN)]


def _signature(batch: Batch) -> object:
    """Return what batches must have in common: all but the values of tensors."""
    named = named_values(batch.content)
    return tuple((place, type(value), _kept(value)) for place, value in named)


def _kept(value: object) -> object:
    """Return what must stay of a value; it is like no other where a graph has none."""
    if isinstance(value, Tensor) and not value.requires_grad:
        return value.shape, value.stride(), value.dtype
    return value if isinstance(value, PLAIN) else object()


def _copied(batch: Batch) -> Batch:
    content = map_tensors(lambda tensor: tensor.detach().clone(), batch.content)
    return Batch(content, batch.size, batch.index)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _are_close(
    found: Mapping[str, list[Tensor]],
    expected: Mapping[str, list[Tensor]],
    tolerance: float,
) -> bool:
    """Return whether sums are the same up to rounding; those not expected are zero."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    close = [
        norm(one - other) <= tolerance * norm(other)
        for name, sums in found.items()
        for one, other in zip(
            sums, expected.get(name, [*map(torch.zeros_like, sums)]), strict=True
        )
    ]
    return expected.keys() <= found.keys() and bool(torch.stack(close).all())
