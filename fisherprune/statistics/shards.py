"""A model in shards, one layer of which is whole at a time, as FSDP2 does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

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
    place_within,
)
from fisherprune.statistics.tensor_parallel import ranks_of_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fisherprune.statistics.passes import Task

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
    managed = [
        p for m in fsdp_modules(task.model) for p in m.parameters() if is_shard(p)
    ]
    ranks = None if group is None else torch.distributed.get_process_group_ranks(group)
    for parameter in managed:
        bounds(parameter)
        if ranks is None or {*ranks} != ranks_of_shards(parameter):
            wanted = "of all ranks that hold shards of the model's parameters"
            raise FieldError("process_group", wanted, shown(ranks))
    return bool(managed)


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


def part_of_all(gradients: Gradients, parameter: Tensor, used: Tensor) -> Gradients:
    """Return what a rank keeps of gradients.

    Args:
        gradients: of a rank's part of ``used``.
        parameter: a parameter.
        used: what the model's forward pass uses in its place.
    """
    if used is parameter:
        return gradients
    return PartOf(gradients, *place_within(parameter, used))
