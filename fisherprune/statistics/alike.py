"""What must be the same on all ranks of a process group, for sums to mean something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from fisherprune.shards import is_shard
from fisherprune.statistics.passes import Task
from fisherprune.statistics.rank_batches import on_every_rank
from fisherprune.statistics.ranks import check_same, gathered
from fisherprune.statistics.shards import check_shards

PART = 2**21
"""Elements of a tensor whose checksum is found at once."""


def agreed(task: Task, **options: object) -> Task:
    """Return the task as this rank works on it, the same one on all ranks.

    Ranks that hold shards of a model's parameters run all batches together.

    Args:
        task: of this rank.
        options: of the call, beside the task's.

    Raises:
        FisherpruneError: on all ranks, where tasks differ or the values of the models
            do: of the first difference.
    """
    in_shards = check_shards(task, task.process_group)
    if (group := task.process_group) is None:
        return task
    facts = {name: repr(value) for name, value in options.items()}
    facts |= {name: repr(getattr(task, name)) for name in ("group_size", "seed")}
    facts |= {f"settings.{k}": repr(v) for k, v in asdict(task.settings).items()}
    once = isinstance(task.batches, Iterator)
    facts["batches"] = "an iterator" if once else "batches that can be read again"
    facts |= _facts(task.model, task.parameters)
    every = gathered(task, "the check of arguments", facts)
    for what in dict.fromkeys(name for each in every for name in each):
        check_same(group, what, [each.get(what) for each in every])
    if not in_shards:
        return task
    if isinstance(task.batches, Iterator):
        task = replace(task, batches=list(task.batches))
    return on_every_rank(task)


def _facts(model: nn.Module, scored: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what the model's tensors must be alike in, values after shapes."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    facts = {
        f"tensor {name!r}": f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
        + (", trainable" if t.requires_grad else "")
        + (f", {[*getattr(t, 'placements', '')]}" if is_shard(t) else "")
        for name, t in named.items()
    }
    facts |= {f"scored parameter {i}": repr(name) for i, name in enumerate(scored)}
    named = {n: t for n, t in named.items() if not is_shard(t)}
    dense = {n: t for n, t in named.items() if t.layout == torch.strided}
    return facts | {f"the values of {n!r}": _checksum(t) for n, t in dense.items()}


def _checksum(tensor: Tensor) -> str:
    """Return sums of the bits that depend on their order, and on nothing else."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for part in flat.view(kinds.get(flat.element_size(), torch.uint8)).split(PART):
        bits = part.long()
        places = torch.arange(1, 1 + len(bits), device=bits.device)
        total = total * 31 + torch.stack([bits.sum(), (bits * places).sum()])
    return "checksum {:x}-{:x}".format(*(n % 2**64 for n in total.tolist()))
