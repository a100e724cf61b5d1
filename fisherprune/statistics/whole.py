"""A model in shards, run with whole parameters on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import device_of
from fisherprune.shards import any_shard, is_shard, settle, shards_of, whole_of
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.structure import moved

if TYPE_CHECKING:
    from fisherprune.statistics.passes import ModelStatistics, Task

T = TypeVar("T")

HOOKS = "torch.distributed.fsdp", "torch.distributed.tensor"
"""Where modules have hooks from that gather parameters, or split inputs."""

SIZES = (
    "tensor parallelism: the pass needs whole parameters, with which the model {}, "
    "maybe as its code counts on the sizes of parts (it may ask for -1 heads): score "
    "it before it is split, and apply the masks to it after"
)


def in_whole(task: Task, run: Callable[[Task], T]) -> T:
    """Run with the whole parameters of a model, which all ranks gather together.

    They take the memory of the model on each rank, as long as it runs.

    Raises:
        FisherpruneError: where tensor parallelism has split a model that computes
            something else with whole parameters.
    """
    if not any_shard(task.model.parameters()):
        return run(task)
    task, batch = _first_batch(task) if task.tensor_group else (task, None)
    expected = None if batch is None else _results(task, batch)
    settle(task.model)
    with _whole_parameters(task.model) as whole:
        if expected is not None:
            _check_results(task, batch, expected)
        scored = {n: whole.get(id(p), p) for n, p in task.parameters.items()}
        masks = task.masks and {n: whole_of(mask) for n, mask in task.masks.items()}
        parts = {
            letter: {n: whole_of(t) for n, t in named.items()}
            for letter, named in task.found.parts.items()
        }
        found = replace(task.found, parts=parts)
        return run(replace(task, parameters=scored, masks=masks, found=found))


def _first_batch(task: Task) -> tuple[Task, Any]:
    """Return a task with the same batches, and the first of them; None of none."""
    with evaluating(task.model, []):
        batches = iter(task.batches)
        first = next(batches, None)
    if isinstance(task.batches, Iterator) and first is not None:
        task = replace(task, batches=chain([first], batches))
    return task, first


def _check_results(task: Task, batch: Any, expected: Tensor) -> None:
    """Refuse a model that computes something else where its parameters are whole.

    Its code may count on the sizes of a rank's parts, of heads of attention say.
    """
    found = _results(task, batch)
    if found is None:
        raise FisherpruneError(SIZES.format("fails"))
    is_other = found.shape != expected.shape
    if is_other or (found - expected).norm() > 1e-2 * expected.norm():
        raise FisherpruneError(SIZES.format("computes other results"))


def _results(task: Task, batch: Any) -> Tensor | None:
    """Return losses or outputs for a batch, in float32; None where that fails."""
    device = device_of(task.parameters)
    with evaluating(task.model, []), torch.no_grad(), suppress(Exception):
        content = moved(batch, device)
        if task.losses is not None:
            return task.losses(task.model, content).float()
        outputs: Tensor = task.model(content[0])
        return whole_of(outputs).float()
    return None


def over_whole(
    run: Callable[[Task], ModelStatistics],
) -> Callable[[Task], ModelStatistics]:
    """Return a pass that sees whole parameters, of one that knows no shards."""

    @wraps(run)
    def run_whole(task: Task) -> ModelStatistics:
        found = in_whole(task, run)
        parts = {n: shards_of(p, task.parameters) for n, p in found.parts.items()}
        return replace(found, parts=parts)

    return run_whole


@contextmanager
def _whole_parameters(model: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Put whole parameters in the place of shards, and leave the hooks of splits out.

    Yields:
        the whole ones, by the ids of those in shards.
    """
    modules, whole = [*model.modules()], dict[int, nn.Parameter]()
    own = [(m._parameters, n, p) for m in modules for n, p in m._parameters.items()]
    shards = [(named, n, p) for named, n, p in own if p is not None and is_shard(p)]
    for _, _, p in shards:
        if id(p) not in whole:
            whole[id(p)] = nn.Parameter(whole_of(p).detach(), p.requires_grad)
    hooks = [h for m in modules for h in (m._forward_pre_hooks, m._forward_hooks)]
    before = [(each, dict(each)) for each in hooks]
    try:
        for named, name, p in shards:
            named[name] = whole[id(p)]
        for each in hooks:
            for key in [key for key, hook in each.items() if _gathers(hook)]:
                del each[key]
        yield whole
    finally:
        for named, name, p in shards:
            named[name] = p
        for each, as_it_was in before:
            each.clear()
            each.update(as_it_was)


def _gathers(hook: object) -> bool:
    """Return whether a module's hook is one of FSDP2 or of tensor parallelism."""
    return getattr(hook, "__module__", "").startswith(HOOKS)
