"""Tensors of which each rank holds a shard: DTensors, of FSDP2 or made by oneself."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


PLAIN = (Tensor, nn.Parameter)


def is_shard(value: object) -> bool:
    """Return whether it is a tensor of which each rank holds a part."""
    if type(value) in PLAIN:  # as most: each call of a model comes here
        return False
    # Where the module was not imported there is none, and importing it takes long.
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def any_shard(values: Iterable[object]) -> bool:
    """Return whether one of them is such a tensor."""
    return any(is_shard(value) for value in values)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part, outside of autograd; all of a tensor of no shards."""
    if not is_shard(tensor):
        return tensor.detach()
    with torch.no_grad():
        return cast("DTensor", tensor).to_local()


def part_in(tensor: Tensor) -> Tensor | None:
    """Return the tensor in which a DTensor has this rank's part; None of another."""
    plain = type(tensor) in PLAIN
    return None if plain else getattr(tensor, "_local_tensor", None)


def is_split(tensor: Tensor, axis: int) -> bool:
    """Return whether ranks hold parts of a tensor along an axis."""
    placements = cast("DTensor", tensor).placements if is_shard(tensor) else ()
    return any(each.is_shard(axis) for each in placements)


def is_everywhere(tensor: Tensor) -> bool:
    """Return whether each rank has all of a tensor."""
    placements = cast("DTensor", tensor).placements if is_shard(tensor) else ()
    return all(each.is_replicate() for each in placements)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """Return the ranks over which tensors are spread; None where none is.

    That is the mesh of most dimensions: some tensors may be spread over a part of it.
    """
    meshes = (cast("DTensor", t).device_mesh for t in tensors if is_shard(t))
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def bounds(like: Tensor) -> tuple[slice, ...]:
    """Return where this rank's part lies in the whole of a sharded tensor.

    Raises:
        FisherpruneError: where the tensor is split in another way than along whole
            dimensions, each rank one piece.
    """
    from torch.distributed.tensor import Replicate, Shard

    spread, found = cast("DTensor", like), [slice(0, n) for n in like.shape]
    coordinate = spread.device_mesh.get_coordinate()
    if coordinate is None:
        raise FisherpruneError("shards: this rank must be in the parameters' mesh")
    steps = zip(coordinate, spread.device_mesh.shape, spread.placements, strict=True)
    # FSDP2 splits the parts of tensor parallelism, though its dimension comes first.
    for i, size, placement in sorted(steps, key=lambda step: _is_strided(step[2])):
        if type(placement) is Shard or _is_strided(placement):
            dim = cast(Shard, placement).dim
            whole = found[dim]
            step = -(-(whole.stop - whole.start) // size)
            start = min(whole.start + i * step, whole.stop)
            found[dim] = slice(start, min(start + step, whole.stop))
        elif type(placement) is not Replicate:
            wanted = "Shard or Replicate, one piece on each rank"
            raise FieldError("shards: placements", wanted, f"{placement}")
    return tuple(found)


def _is_strided(placement: object) -> bool:
    """Return whether a dimension of a mesh splits what a later one has split."""
    return type(placement).__name__ == "_StridedShard"


def place_within(
    like: Tensor, outer: Tensor
) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """Return the shape of what a rank has of one tensor, and where another's part is.

    Args:
        like: in shards.
        outer: the same tensor, whole or in larger parts.
    """
    starts = [place.start for place in bounds(outer)] if is_shard(outer) else None
    pairs = zip(bounds(like), starts or [0] * like.dim(), strict=True)
    place = tuple(slice(p.start - first, p.stop - first) for p, first in pairs)
    return tuple(local(outer).shape), place


def flat_places(chosen: Tensor, like: Tensor) -> Tensor:
    """Return the flat indices in the whole of what is chosen in this rank's part."""
    places = chosen.nonzero()
    flat = places.new_zeros(len(places))
    for i, (size, place) in enumerate(zip(like.shape, bounds(like), strict=True)):
        flat = flat * size + places[:, i] + place.start
    return flat


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return what this rank holds of a whole tensor that is split like another."""
    return whole[bounds(like)].contiguous() if is_shard(like) else whole


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """Return a rank's part as a tensor that is split like another."""
    if not is_shard(like):
        return part
    from torch.distributed.tensor import DTensor

    spread, strides = cast(DTensor, like), torch.empty(like.shape, device="meta")
    where = spread.device_mesh, spread.placements
    options: dict[str, Any] = {"shape": like.shape, "stride": strides.stride()}
    return DTensor.from_local(part, *where, run_check=False, **options)


def split_as(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient of a DTensor in the parts in which that is; any other as is."""
    if not is_shard(gradient):
        return gradient
    placements = cast("DTensor", like).placements
    with torch.no_grad():
        return cast("DTensor", gradient).redistribute(placements=placements)


def shards_of(whole: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict:
    """Return whole tensors split like others, by name; no rank sends anything."""
    return {n: as_shard(part_of(t, like[n]), like[n]) for n, t in whole.items()}


def split_like(tensor: Tensor, like: Tensor, what: str) -> Tensor:
    """Return a tensor on the device and in the shards of another of its shape.

    Raises:
        FisherpruneError: where it is in other shards.
    """
    if not is_shard(tensor):
        return as_shard(part_of(tensor, like).to(like.device), like)
    mine, theirs = (cast("DTensor", t) for t in (tensor, like))
    if not is_shard(like) or mine.device_mesh != theirs.device_mesh:
        raise FieldError(
            what,
            "whole, or in shards of the same ranks (whole() makes it so)",
            "others",
        )
    if mine.placements != theirs.placements:
        raise FieldError(what, f"split as {theirs.placements}", f"{mine.placements}")
    return tensor


def check_whole(what: str, instead: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors in shards.

    Raises:
        FisherpruneError: where there is one; it says what to do instead.
    """
    for name, tensor in tensors.items():
        if is_shard(tensor):
            raise FieldError(what, f"whole ({instead})", f"{name!r} in shards")


def whole_of(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor on each rank, which all ranks ask for."""
    with torch.no_grad():
        return cast("DTensor", tensor).full_tensor() if is_shard(tensor) else tensor


def joined_parts(outputs: T) -> T:
    """Return outputs that are a DTensor as a whole tensor; autograd goes through it."""
    return cast("Any", outputs).full_tensor() if is_shard(outputs) else outputs


def counts_here(tensor: Tensor, mesh: DeviceMesh | None) -> bool:
    """Return whether this rank counts its part, which others may hold as well."""
    if mesh is None:
        return True
    if not is_shard(tensor):
        return not any(mesh.get_coordinate() or [1])
    spread = cast("DTensor", tensor)
    own = spread.device_mesh
    if mesh.mesh.flatten()[0] not in own.mesh:  # the tensor is in other ranks, too
        return False
    pairs = zip(own.get_coordinate() or [1], spread.placements, strict=True)
    return not any(i for i, placement in pairs if placement.is_replicate())


def summed(values: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Return the sum over the ranks of what each counts."""
    return _reduced(values, mesh, torch.distributed.ReduceOp.SUM) if mesh else values


def largest(tensors: Mapping[str, Tensor], absolute: bool = False) -> dict[str, float]:
    """Return the largest entry of each, 0 of none, with one wait for the device."""
    parts = [local(tensor) for tensor in tensors.values()]
    if not parts:
        return {}
    for i, (part, tensor) in enumerate(zip(parts, tensors.values(), strict=True)):
        if not part.numel():
            parts[i] = part.new_full((1,), -math.inf if tensor.numel() else 0.0)
        elif absolute:
            parts[i] = part.abs()
    tops = torch._foreach_max(parts)
    values = torch.stack([top.to(tops[0].device) for top in tops])
    if mesh := mesh_of(tensors.values()):
        values = _reduced(values, mesh, torch.distributed.ReduceOp.MAX)
    return dict(zip(tensors, values.tolist(), strict=True))


def count_true(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many entries of each are not 0, with one wait for the device."""
    mesh = mesh_of(masks.values())
    counts = [
        torch.count_nonzero(local(m)) * counts_here(m, mesh) for m in masks.values()
    ]
    if not counts:
        return {}
    values = torch.stack([count.to(counts[0].device) for count in counts])
    return dict(zip(masks, summed(values, mesh).tolist(), strict=True))


def _reduced(values: Tensor, mesh: DeviceMesh, op: Any) -> Tensor:
    """Reduce over all ranks of a mesh; every one of them must come here."""
    reduced = values.to(mesh.device_type, copy=True)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(reduced, op, group=mesh.get_group(dim))
    return reduced


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters FSDP2 gathers, those within others too."""
    known = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(known, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def is_flat(model: nn.Module) -> bool:
    """Return whether a part of a model is in the shards of the first FSDP."""
    known = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(known, "FullyShardedDataParallel", None)
    return kind is not None and any(isinstance(m, kind) for m in model.modules())


def settle(model: nn.Module) -> None:
    """Let a model have its shards as parameters, where a forward pass left whole ones.

    FSDP2 does so itself before the next backward pass or ``state_dict``.
    """
    for module in fsdp_modules(model):
        module.reshard()


def gathered_in_turn(model: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Yield what the forward pass uses in the place of shards, by their ids.

    Of one module of FSDP2 after the other; each is gathered and let go. Parts of tensor
    parallelism stay parts.
    """
    for module in fsdp_modules(model):
        before = _own(module)
        module.unshard()
        after = _own(module)
        module.reshard()
        yield {
            id(p): after[key]
            for key, p in before.items()
            if is_shard(p) and after[key] is not p
        }


def _own(module: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    return {
        (id(m), name): p
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None
    }
