"""A model in shards, run with whole parameters on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fisherprune.shards import any_shard, is_shard, shards_of, whole_of

if TYPE_CHECKING:
    from fisherprune.statistics.passes import ModelStatistics, Task

T = TypeVar("T")

HOOKS = "torch.distributed.fsdp", "torch.distributed.tensor"
"""Where modules have hooks from that gather parameters, or split inputs."""


def in_whole(task: Task, run: Callable[[Task], T]) -> T:
    """Run with the whole parameters of a model, which all ranks gather together.

    They take the memory of the model on each rank, as long as it runs.
    """
    if not any_shard(task.model.parameters()):
        return run(task)
    with _whole_parameters(task.model) as whole:
        scored = {n: whole.get(id(p), p) for n, p in task.parameters.items()}
        masks = task.masks and {n: whole_of(mask) for n, mask in task.masks.items()}
        parts = {
            letter: {n: whole_of(t) for n, t in named.items()}
            for letter, named in task.found.parts.items()
        }
        found = replace(task.found, parts=parts)
        return run(replace(task, parameters=scored, masks=masks, found=found))


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
