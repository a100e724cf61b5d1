"""Calls on tensors that are split over ranks: DTensors, as tensor parallelism has them.

Such a call runs as it is. In its backward pass each rank gets what meets its own part
of a parameter, and finds the gradients of that part as it would those of a whole one.
So what is sent is of the size of activations, and no gradient of a sample is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fisherprune.persample.contributions import Contribution, PartOf, Rows
from fisherprune.persample.functions import Function
from fisherprune.persample.lookups import Lookups
from fisherprune.persample.meeting import (
    RULES,
    Meeting,
    Rule,
    layer_rule,
    multiplied_out,
    sorted_out,
)
from fisherprune.shards import bounds, is_shard, local, whole_of


def added_up(output: Any) -> Any:
    """Return a call's result, whole where its parts are of no plain kind.

    As those of an embedding whose rows are split: what copies it loses its mask.
    """
    if not isinstance(output, DTensor):
        return output
    if all(type(each) in (Shard, Replicate, Partial) for each in output.placements):
        return output
    return output.redistribute(placements=[Replicate()] * output.device_mesh.ndim)


def split_rule(func: Function, is_layer: bool) -> Rule:
    """Return the rule for a call whose shared tensors are parameters in parts.

    Args:
        func: that is called.
        is_layer: whether the rule for a kind of layer covers the call.
    """
    if func is F.linear and is_layer:
        return _linear
    own = layer_rule if is_layer else RULES.get(func) or multiplied_out
    reads = not is_layer and func is not F.embedding

    def rule(
        meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
    ) -> dict[int, Contribution]:
        whole = [
            whole_of(t) if reads or i not in meeting.shared else _empty_like(t)
            for i, t in enumerate(tensors)
        ]
        found = own(meeting, whole_of(grad), whole)
        return {i: _part(each, tensors[i]) for i, each in found.items()}

    return rule


def _empty_like(shared: Tensor) -> Tensor:
    """Return what has a parameter's shape and no values: its rule reads none."""
    return torch.empty(shared.shape, device="meta", dtype=shared.dtype)


def _linear(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """Return those of a linear layer, of the features that a rank's part meets."""
    call = sorted_out(meeting, tensors)
    found = dict[int, Contribution]()
    for i in meeting.shared:
        spread = tensors[i]
        rows, columns = _sides(spread, is_bias=spread is call.bias)
        own = list(tensors)
        for j, each in enumerate(tensors):
            if each is call.input:
                own[j] = _placed(each, spread, columns)
            elif j in meeting.shared:
                own[j] = local(each)
        only, own_grad = replace(meeting, shared=(i,)), _placed(grad, spread, rows)
        found[i] = (
            layer_rule(only, own_grad, own)[i]
            if local(spread).numel()
            else _none(len(meeting.output.apart(own_grad)), spread)
        )
    return found


def _none(samples: int, shared: Tensor) -> Rows:
    """Return the gradients of an empty part: there may be more ranks than features."""
    return Rows(torch.zeros(samples, *local(shared).shape, device=shared.device))


def _sides(shared: Tensor, is_bias: bool) -> tuple[Placement, Placement]:
    """Return how the outputs' gradients and the inputs are split where a part is."""
    assert isinstance(shared, DTensor)
    (placement,) = shared.placements
    last = Shard(-1)
    if not isinstance(placement, Shard):
        return Replicate(), Replicate()
    if placement.dim == 0:
        return last, Replicate()
    assert not is_bias
    return Replicate(), last


def _placed(tensor: Tensor, like: Tensor, placement: Placement) -> Tensor:
    """Return a rank's part of a tensor that is split along its last axis, or whole."""
    assert isinstance(like, DTensor)
    if not isinstance(tensor, DTensor):
        tensor = _everywhere(tensor, like.device_mesh)
    return local(tensor.redistribute(placements=[placement]))


def _everywhere(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def _part(contribution: Contribution, shared: Tensor) -> Contribution:
    """Return what is of this rank's part of a parameter."""
    if not is_shard(shared):
        return contribution
    place, shape = bounds(shared), tuple(shared.shape)
    if all(p.stop - p.start == n for p, n in zip(place, shape, strict=True)):
        return contribution
    if not local(shared).numel():
        return _none(len(contribution), shared)
    if isinstance(contribution, Lookups):
        rows, columns = place
        return replace(
            contribution,
            indices=contribution.indices - rows.start,  # below 0: no gradient
            grad=contribution.grad[:, columns],
            shape=(rows.stop - rows.start, columns.stop - columns.start),
        )
    return PartOf(contribution, shape, place)
