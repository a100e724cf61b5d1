"""A model in shards, one layer of which is whole at a time, as FSDP2 does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.persample.contributions import Gradients, PartOf
from fisherprune.shards import (
    any_shard,
    bounds,
    fsdp_modules,
    gathered_in_turn,
    is_flat,
    is_shard,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fisherprune.statistics.passes import Task

UNMANAGED = (
    "parameters: {!r} is a DTensor that FSDP2 does not gather, of tensor parallelism "
    "for instance, whose layers can't be seen at work: score the model before it is "
    "split, and apply the masks to it after, which works"
)


FLAT = (
    "model: FullyShardedDataParallel hides parameters in flat ones: use "
    "torch.distributed.fsdp.fully_shard, or score the model before it is wrapped"
)


def check_shards(task: Task, group: ProcessGroup | None) -> bool:
    """Return whether a model is in shards that passes can work on.

    Raises:
        FisherpruneError: where it is in others, or not on the ranks of the group.
    """
    if is_flat(task.model):
        raise FisherpruneError(FLAT)
    named = {n: p for n, p in task.model.named_parameters() if is_shard(p)}
    ranks = None if group is None else torch.distributed.get_process_group_ranks(group)
    _check_managed(task.model, named)
    for spread in map(_with_places, named.values()):
        if ranks is None or {*ranks} != {*spread.device_mesh.mesh.flatten().tolist()}:
            wanted = "of all ranks that hold shards of the model's parameters"
            raise FieldError("process_group", wanted, shown(ranks))
    return bool(named)


def _check_managed(model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    """Refuse shards that are not FSDP2's alone: one over ranks, or copies of that."""
    managed = {id(p) for module in fsdp_modules(model) for p in module.parameters()}
    for name, parameter in named.items():
        *copies, split = _with_places(parameter).placements
        alone = split.is_shard() and all(each.is_replicate() for each in copies)
        if id(parameter) not in managed or not alone:
            raise FisherpruneError(UNMANAGED.format(name))
        bounds(parameter)


def _with_places(parameter: nn.Parameter) -> Any:
    """Return a parameter in shards, whose attributes type checkers don't know."""
    return parameter


@contextmanager
def in_layers(task: Task) -> Iterator[Task]:
    """Yield a task that knows what the model's forward pass uses in place of shards.

    FSDP2 gathers the parameters of a layer, or a block of these, for the time in which
    they are used, and here as in training.
    """
    if not any_shard(task.model.parameters()):
        yield task
        return
    whole = dict[int, nn.Parameter]()
    for some in gathered_in_turn(task.model):
        whole |= some
    named = task.parameters.items()
    leaves = {n: whole[id(p)] for n, p in named if id(p) in whole}
    try:
        yield replace(task, leaves=leaves)
    except BaseException:
        _forget(task.model)
        raise
    _finish(task.model)


def _finish(model: nn.Module) -> None:
    """Let go what FSDP2 has gathered ahead: weights may change before the next pass."""
    for module in fsdp_modules(model):
        module.unshard()
        module.reshard()


def _forget(model: nn.Module) -> None:
    """Let FSDP2 forget a forward pass that an error ended, as far as it can."""
    for module in fsdp_modules(model):
        with suppress(RuntimeError, AttributeError):  # not the first one, or an old one
            module.reset_iter_state()


def part_of_all(gradients: Gradients, parameter: Tensor) -> Gradients:
    """Return what a rank keeps of the gradients of a whole parameter."""
    if not is_shard(parameter):
        return gradients
    return PartOf(gradients, tuple(parameter.shape), bounds(parameter))
