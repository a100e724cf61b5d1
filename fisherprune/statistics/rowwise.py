"""First batches of which it is known that samples don't mix: no sample runs alone."""

from __future__ import annotations

import pickle
import random
import sys
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from fisherprune.parameters import device_of
from fisherprune.persample.rowwise_tap import RowwiseTap
from fisherprune.shards import PLAIN
from fisherprune.statistics.batches import Batch, running
from fisherprune.statistics.forward import Forward, Ran
from fisherprune.statistics.known_losses import are_of_outputs
from fisherprune.statistics.passes import Task


def may_be_rowwise(task: Task) -> bool:
    """Return whether it can be known: losses are of outputs, no rank has parts."""
    in_parts = task.tensor_group is not None or task.leaves
    return are_of_outputs(task.losses) and not in_parts


def constants_of(task: Task, batch: Batch) -> set[int] | None:
    """Return the ids of the tensors that are the same for all batches.

    None where changes of a tensor are not seen by its version, or ranks have parts.
    """
    if any(type(t) is not Tensor or t.is_inference() for t in batch.tensors):
        return None
    found, seen, todo, kinds = set[int](), set[int](), [task.model], set[type]()
    for module in todo:  # which grows
        for tensors in (module._parameters, module._buffers):
            if tensors:
                found.update(map(id, tensors.values()))
                kinds.update(map(type, tensors.values()))
        for inner in module._modules.values() if module._modules else ():
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                todo.append(inner)
    return found if kinds <= {*PLAIN, type(None)} else None


def run_rowwise(
    op: str,
    task: Task,
    forward: Forward,
    batch: Batch,
    tap: RowwiseTap,
    within: AbstractContextManager[object],
) -> Ran | None:
    """Run a batch; None where it is not known that samples keep apart.

    Neither is that known where the model draws random numbers.

    Args:
        op: named in errors.
        task: with the model.
        forward: the pass.
        batch: of at least two samples.
        tap: of the batch.
        within: in which the tap is active.
    """
    before = _random_states(task)
    try:
        with running(op, batch), within:
            ran = forward(task.model, replace(batch, watch=tap.end_with))
    except Exception:
        if tap.holds:  # it is the model's
            raise
        batch.check_unchanged(op)
        return None
    is_known = tap.is_proved and _random_states(task) == before
    if not is_known:
        batch.check_unchanged(op)
    return ran if is_known else None


def _random_states(task: Task) -> list[object]:
    """Return the states of the generators that a model may draw from."""
    device, drawn = device_of(task.parameters), sys.modules.get("numpy.random")
    states: list[object] = [random.getstate(), torch.get_rng_state().numpy().tobytes()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    if drawn is not None:
        found = drawn.get_state()
        if isinstance(found, tuple):  # of the generator that is there by default
            states += [found[1].tobytes(), *found[2:]]
        else:
            states.append(pickle.dumps(found))
    return states
