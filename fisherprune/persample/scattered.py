"""Calls whose rows are of any samples: sorted, chosen by a mask, sent to experts.

Values don't tell whose rows they are, but gradients do: where the loss of each sample
has a factor of its own, the gradient of a row has the factor of the sample whose loss
depends on it. So a sample's gradient of a weight is the sum over its rows, whatever the
model computed them from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.arguments import Arguments
from fisherprune.persample.contributions import Contribution, Rows
from fisherprune.persample.factors import Factors
from fisherprune.persample.functions import Function
from fisherprune.persample.layers.embedding import is_lookup
from fisherprune.persample.layers.product import is_grouped
from fisherprune.persample.layout import Layout, Scattered
from fisherprune.persample.lookups import Lookups
from fisherprune.persample.meeting import RULES, Meeting, Rule, sorted_out
from fisherprune.persample.ragged import RaggedFactors
from fisherprune.persample.registry import CALLS

Found = tuple[int, Rule] | None
"""How many dimensions a row of the result has, and the rule for the gradients."""

Find = Callable[[Function, Arguments, Sequence[Tensor], Collection[int]], Found]
"""Of a call, and the places of the shared ones among its tensors."""

ROWWISE: dict[Function, Find] = {}
"""Functions of which a row of the result comes from one row of what they read."""


def rule_for_rows(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    """Return the dimensions of a row and the rule; None where there is no rule."""
    find = ROWWISE.get(func)
    return find and find(func, arguments, tensors, shared)


def _rowwise(*functions: Function) -> Callable[[Find], Find]:
    def register(find: Find) -> Find:
        ROWWISE.update(dict.fromkeys(functions, find))
        return find

    return register


@_rowwise(F.linear, torch.addmm, torch.matmul, Tensor.matmul, torch.mm, Tensor.mm)
@_rowwise(torch.inner, Tensor.inner, torch.einsum, torch.tensordot)
def _find_linear(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    args, kwargs = arguments
    call = CALLS[func](*args, **kwargs)
    if call is None or call.weight is None or call.weight.dim() != 2:
        return None
    operands = [id(each) for each in (call.weight, call.bias)]
    fits = all(id(tensors[i]) in operands for i in shared) and call.input.dim() > 1
    return (1, _linear) if fits and not call.input.is_complex() else None


def _linear(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    call, rows = sorted_out(meeting, tensors), meeting.rows
    assert rows
    found = dict[int, Contribution]()
    for i in meeting.shared:
        if tensors[i] is call.bias:
            found[i] = _of_rows(call.layer.bias_grads(rows.rows(grad)), rows)
        else:
            # Under autocast the layer ran in the output's dtype.
            input = rows.rows(call.input.to(grad.dtype))
            shape = tuple(tensors[i].shape)
            own = call.layer.weight_grads(rows.rows(grad), input, shape)
            found[i] = _of_rows(own, rows)
    return found


@_rowwise(F.embedding, F.layer_norm, F.rms_norm)
def _find_first(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    if 0 in shared:
        return None
    if func is F.embedding:
        return 1, _as_samples({0: 0})
    features = len(arguments[0][1])
    return features, _as_samples({0: features})


@_rowwise(torch.add, Tensor.add, torch.sub, Tensor.sub, torch.mul, Tensor.mul)
def _find_either(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    if len(tensors) != 2 or len(shared) != 1:
        return None
    (place,) = shared
    parameter, other = tensors[place], tensors[1 - place]
    features = other.dim()
    while features and (features > parameter.dim() or parameter.shape[-features] == 1):
        features -= 1
    if features == other.dim():
        return None
    return features, _as_samples({1 - place: features})


def _as_samples(features: dict[int, int]) -> Rule:
    """Return the rule that takes rows for samples.

    Args:
        features: the dimensions of a row in what has rows, by the place of the tensor.
    """

    def rule(
        meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
    ) -> dict[int, Contribution]:
        rows = meeting.rows
        assert rows
        grads, flat = rows.rows(grad), list(tensors)
        for i, each in features.items():
            flat[i] = tensors[i].flatten(0, tensors[i].dim() - 1 - each)
        layout = Layout(0, len(grads))
        layouts = (layout if i in features else None for i in range(len(flat)))
        same = replace(meeting, layouts=tuple(layouts), output=layout, rows=None)
        found = RULES[meeting.func](same, grads, flat)
        return {i: _of_rows(each, rows) for i, each in found.items()}

    return rule


def _of_rows(contribution: Any, rows: Scattered) -> Contribution:
    """Return the contribution of samples, of one whose samples are the rows."""
    numbers = rows.told()
    if isinstance(contribution, Factors):
        return RaggedFactors.of(contribution, numbers, rows.samples)
    if isinstance(contribution, Lookups):
        return contribution.of_rows(numbers, rows.samples)
    each = contribution.per_sample()
    # As autograd sums up for an embedding: the same bits each time, on a GPU too.
    sums = torch.ops.aten.embedding_dense_backward(
        each.flatten(1) if each.dim() > 1 else each.unsqueeze(1),
        *(numbers, rows.samples, -1, False),
    )
    return Rows(sums.view(rows.samples, *each.shape[1:]))


@_rowwise(Tensor.__getitem__)
def _find_indexed(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    fits = is_lookup(arguments, tensors, shared)
    return (tensors[0].dim() - 1, RULES[func]) if fits else None


@_rowwise(F.embedding_bag)
def _find_bags(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    return None if 0 in shared else (1, RULES[func])


@_rowwise(torch._grouped_mm)
def _find_grouped(
    func: Function,
    arguments: Arguments,
    tensors: Sequence[Tensor],
    shared: Collection[int],
) -> Found:
    return (1, RULES[func]) if is_grouped(tensors, shared) else None
