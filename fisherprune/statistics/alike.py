"""What must be the same on all ranks of a process group, for sums to mean something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from fisherprune.shards import is_everywhere, is_shard, local
from fisherprune.statistics.passes import Task
from fisherprune.statistics.rank_batches import on_every_rank
from fisherprune.statistics.ranks import check_same, checksum, gathered
from fisherprune.statistics.shards import check_shards
from fisherprune.statistics.tensor_parallel import mesh_of_parts, on_the_mesh


def agreed(task: Task, **options: object) -> Task:
    """Return the task as this rank works on it, the same one on all ranks.

    Ranks that hold shards of a model's parameters run all batches together. Those of a
    tensor-parallel mesh have the same batches.

    Args:
        task: of this rank.
        options: of the call, beside the task's.

    Raises:
        FisherpruneError: on all ranks, where tasks differ or the values of the models
            do: of the first difference.
    """
    mesh = mesh_of_parts(task.model)
    if (group := task.process_group) is None and mesh is None:
        check_shards(task, group)
        return task
    facts = _of_task(task, options)
    if mesh is not None:
        task = on_the_mesh(task, mesh, facts | _facts(task.model, task.parameters))
    in_shards = check_shards(task, group)
    if group is None:
        return task
    facts |= _facts(task.model, task.parameters, parts=not in_shards)
    every = gathered(task, "the check of arguments", facts)
    for what in dict.fromkeys(name for each in every for name in each):
        check_same(group, what, [each.get(what) for each in every])
    if not in_shards:
        return task
    if isinstance(task.batches, Iterator):
        task = replace(task, batches=list(task.batches))
    return on_every_rank(task)


def _of_task(task: Task, options: Mapping[str, object]) -> dict[str, str]:
    """Return what a task and its call must be alike in, beside the model."""
    facts = {name: repr(value) for name, value in options.items()}
    facts |= {name: repr(getattr(task, name)) for name in ("group_size", "seed")}
    facts |= {f"settings.{k}": repr(v) for k, v in asdict(task.settings).items()}
    once = isinstance(task.batches, Iterator)
    facts["batches"] = "an iterator" if once else "batches that can be read again"
    return facts


def _facts(
    model: nn.Module, scored: Mapping[str, Tensor], parts: bool = False
) -> dict[str, str]:
    """Return what the model's tensors must be alike in, values after shapes.

    Args:
        model: of a rank.
        scored: parameters of it.
        parts: whether ranks hold the same parts of those that are split; else values
            are compared of what each has whole.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    facts = {
        f"tensor {name!r}": f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
        + (", trainable" if t.requires_grad else "")
        + (f", {[*getattr(t, 'placements', '')]}" if is_shard(t) else "")
        for name, t in named.items()
    }
    facts |= {f"scored parameter {i}": repr(name) for i, name in enumerate(scored)}
    own = {n: local(t) for n, t in named.items() if parts or is_everywhere(t)}
    dense = {n: t for n, t in own.items() if t.layout == torch.strided}
    return facts | {f"the values of {n!r}": checksum(t) for n, t in dense.items()}
