"""The ranks of a tensor-parallel mesh: they run a model together, on the same batches.

Each finds the moments of its own parts of the parameters, so nothing is added up over
these ranks. What one of them sees in its parts decides for all: else some would send
what others don't wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.shards import fsdp_modules, is_shard, local
from fisherprune.statistics.batches import Batches, check_iterable
from fisherprune.statistics.ranks import (
    checksum,
    described_error,
    device_between,
    difference,
)
from fisherprune.statistics.structure import named_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fisherprune.statistics.passes import Task

OF = "tensor parallelism"
"""What errors begin with."""

SEVERAL = (
    "parameters: {!r} is split over {}, but tensor parallelism must be over one "
    "dimension of a mesh, the same for all parameters: parallelize_module(model, "
    'mesh["tp"], plan), and fully_shard(model, mesh=mesh["dp"]) of all of it after '
    "that, where it is sharded, too"
)
TWINS = (
    "process_group must be of ranks that have batches of their own, but its ranks {} "
    "hold parts of the same parameters by tensor parallelism, and have the same "
    'batches: give mesh["dp"].get_group(), or none where there is no other dimension'
)
UNLIKE = (
    "parameters: the gradients of {!r} differ on the ranks of tensor parallelism, "
    "where it is no DTensor and meets other features on each of them: make it one by "
    "distribute_tensor(p, mesh, [Replicate()]), with inputs that are DTensors, too, or "
    "leave it out"
)


def mesh_of_parts(model: nn.Module) -> DeviceMesh | None:
    """Return the ranks that hold parts of parameters by tensor parallelism.

    Raises:
        FisherpruneError: where they are not those of one dimension of a mesh.
    """
    managed = {id(p) for module in fsdp_modules(model) for p in module.parameters()}
    found: DeviceMesh | None = None
    for name, p in model.named_parameters():
        if not is_shard(p) or id(p) in managed and not _is_sharded_twice(p):
            continue
        mesh = _spread(p).device_mesh
        own = mesh[mesh.mesh_dim_names[-1]] if id(p) in managed else mesh
        found = found or own
        if own.ndim > 1 or own != found:
            raise FisherpruneError(SEVERAL.format(name, mesh))
    return found


def _is_sharded_twice(parameter: nn.Parameter) -> bool:
    """Return whether FSDP2 has split parts of tensor parallelism, the last dimension.

    Otherwise its own is the last one, behind that of copies.
    """
    placements = _spread(parameter).placements
    return len(placements) > 1 and not placements[-2].is_replicate()


def ranks_of_shards(parameter: nn.Parameter) -> set[int]:
    """Return the ranks among which FSDP2 has shared out a parameter, or a part."""
    mesh = _spread(parameter).device_mesh
    if _is_sharded_twice(parameter):
        mesh = mesh[mesh.mesh_dim_names[:-1]]
    return {*mesh.mesh.flatten().tolist()}


def _spread(parameter: Tensor) -> Any:
    """Return a parameter in shards, whose attributes type checkers don't know."""
    return parameter


def on_the_mesh(task: Task, mesh: DeviceMesh, facts: Mapping[str, str]) -> Task:
    """Return the task of a rank that runs a model together with others of a mesh.

    Args:
        task: of this rank.
        mesh: of one dimension.
        facts: that must be the same on all its ranks.

    Raises:
        FisherpruneError: on all ranks, where facts differ, or the task's process group
            has other ranks of the mesh.
    """
    twins = {*mesh.mesh.flatten().tolist()}
    if (group := task.process_group) is not None:
        ranks = torch.distributed.get_process_group_ranks(group)
        if len(both := sorted(twins & {*ranks})) > 1:
            raise FisherpruneError(TWINS.format(both))
    check_iterable(task.batches, task.losses is None)
    task = replace(task, tensor_group=mesh.get_group())
    check_alike(task, facts)
    every: Any = SameBatches(task.batches, mesh.get_group())
    batches = iter(every) if isinstance(task.batches, Iterator) else every
    return replace(task, batches=batches)


def check_alike(task: Task, facts: Mapping[str, str]) -> None:
    """Refuse facts that differ, on all ranks of the mesh alike.

    Raises:
        FisherpruneError: of the first that does.
    """
    _check_alike(task.tensor_group, exchanged(task, facts))


def _check_alike(
    group: ProcessGroup | None, every: Sequence[Mapping[str, str]]
) -> None:
    for what in dict.fromkeys(name for each in every for name in each):
        assert group is not None
        if text := difference(group, OF, what, [each.get(what) for each in every]):
            raise FisherpruneError(text)


def exchanged(task: Task, content: Any) -> list[Any]:
    """Return what every rank of the mesh brings, in order; without one, it alone."""
    group = task.tensor_group
    return [content] if group is None else _exchanged(group, content)


def _exchanged(group: ProcessGroup, content: Any) -> list[Any]:
    every: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(every, content, group=group)
    return every


class SameBatches:
    """Batches that the ranks of a mesh read together, each its own copy.

    All ranks stop where one can't read a batch, or theirs differ.
    """

    def __init__(self, batches: Batches, group: ProcessGroup) -> None:
        self.batches, self.group = batches, group

    def __len__(self) -> int:
        """Return the number of batches, where it is known."""
        sized: Any = self.batches
        return len(sized)

    def __iter__(self) -> Iterator[Any]:
        """Pass over the batches once."""
        error, own = None, iter(())
        try:
            own = iter(self.batches)
        except Exception as failure:
            error = failure
        while True:
            batch = None
            try:
                facts = {"batches": "at their end"}
                if error is None:
                    batch = (next(own),)
                    facts = _facts(batch[0])
            except StopIteration:
                pass
            except Exception as failure:
                error = failure
            self._agree(facts, error)
            if batch is None:
                return
            yield batch[0]

    def _agree(self, facts: Mapping[str, str], error: Exception | None) -> None:
        text = None if error is None else described_error(error)
        every = _exchanged(self.group, (text, facts))
        if error is not None:
            raise error
        ranks = torch.distributed.get_process_group_ranks(self.group)
        for rank, (what, _) in zip(ranks, every, strict=True):
            if what is not None:
                raise FisherpruneError(f"{OF}: rank {rank} failed: {what}")
        _check_alike(self.group, [each[1] for each in every])


def _facts(batch: Any) -> dict[str, str]:
    """Return what batches must have alike."""
    facts = {"batches": "a batch"}
    for place, tensor in named_tensors(batch):
        what = f"batches: tensor {place}" if place else "batches: tensor"
        facts[what] = f"{tensor.dtype} {list(tensor.shape)}"
        if tensor.layout == torch.strided and not tensor.is_nested:
            facts[what] += f", {checksum(tensor)}"
    return facts


def check_results(op: str, task: Task, result: Tensor) -> None:
    """Refuse losses that differ: then each rank sees some of the outputs only.

    Raises:
        FisherpruneError: where they do, on all ranks of the mesh alike.
    """
    if (group := task.tensor_group) is None:
        return
    norms = exchanged(task, float(result.detach().double().norm()))
    ranks = torch.distributed.get_process_group_ranks(group)
    for rank, norm in zip(ranks, norms, strict=True):
        if abs(norm - norms[0]) > 1e-2 * abs(norms[0]):
            raise FisherpruneError(
                f"{op}: {OF}: the losses must be the same on all ranks of a mesh, got "
                f"the norms {norms[0]:.6g} on rank {ranks[0]} and {norm:.6g} on rank "
                f"{rank}: the model must return whole outputs, as with "
                "output_layouts=Replicate()"
            )


def any_rank(task: Task, *flags: object) -> list[bool]:
    """Return for each flag whether it is set on a rank of the mesh."""
    return [*map(any, zip(*exchanged(task, flags), strict=True))]


def _has_twins(tensor: Tensor, group: ProcessGroup) -> bool:
    """Return whether all ranks of the mesh have the same of a tensor."""
    if not is_shard(tensor):
        return True
    ranks = torch.distributed.get_process_group_ranks(group)
    spread = _spread(tensor)
    over_them = {*ranks} <= {*spread.device_mesh.mesh.flatten().tolist()}
    return spread.placements[-1].is_replicate() or not over_them


def copy_replicated_(task: Task, named: Mapping[str, Tensor]) -> None:
    """Set what all ranks of the mesh have to that of the first: to its bits.

    Raises:
        FisherpruneError: where it differs by more than rounding.
    """
    if (group := task.tensor_group) is None:
        return
    first = torch.distributed.get_global_rank(group, 0)
    differs = []
    for name, tensor in named.items():
        if not _has_twins(tensor, group):
            continue
        own = local(tensor)
        sent = own.to(device_between(group, own), copy=True).contiguous()
        torch.distributed.broadcast(sent, first, group)
        sent = sent.to(own.device)
        if (own - sent).norm() > 1e-3 * sent.norm():
            differs.append(name)
        own.copy_(sent)
    for name in dict.fromkeys(n for each in exchanged(task, differs) for n in each):
        raise FisherpruneError(UNLIKE.format(name))
