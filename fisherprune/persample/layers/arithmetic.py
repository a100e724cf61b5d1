"""Parameters that are added, multiplied or expanded: tokens, scales, positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherprune.persample.contributions import Contribution, Rows
from fisherprune.persample.meeting import Meeting, multiplied_out, register_rule


def _unexpanded(grads: Tensor, shape: Sequence[int]) -> Rows:
    """Sum over what was broadcast: ``[N, *output] -> [N, *shape]``."""
    new = grads.dim() - 1 - len(shape)
    rows = grads.float().flatten(1, new).sum(1) if new else grads.float()
    dims = [1 + i for i, n in enumerate(shape) if n == 1 and rows.shape[1 + i] != 1]
    return Rows(rows.sum(dims, keepdim=True) if dims else rows)


def _others(meeting: Meeting, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, those of samples with the samples in front."""
    return [
        layout.apart(tensor) if layout else tensor
        for layout, tensor in zip(meeting.layouts, tensors, strict=True)
    ]


def _is_plain(meeting: Meeting) -> bool:
    """Return whether two tensors meet, without an ``alpha`` or the like."""
    _, kwargs = meeting.arguments
    return len(meeting.layouts) == 2 and not kwargs.keys() - {"other", "input"}


@register_rule(torch.add, Tensor.add, torch.sub, Tensor.sub, Tensor.__rsub__)
def sums(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """``input + other``, ``input - other``: the gradient itself, or less it."""
    if not _is_plain(meeting):
        return multiplied_out(meeting, grad, tensors)
    grads = meeting.output.apart(grad)
    signs = {torch.sub: (1, -1), Tensor.sub: (1, -1), Tensor.__rsub__: (-1, 1)}
    sign = signs.get(meeting.func, (1, 1))
    return {
        i: _unexpanded(grads if sign[i] > 0 else -grads, tensors[i].shape)
        for i in meeting.shared
    }


@register_rule(torch.mul, Tensor.mul)
def products(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """``input * other``: the gradient times the other one."""
    if not _is_plain(meeting) or len(meeting.shared) == 2:
        return multiplied_out(meeting, grad, tensors)
    (i,), others = meeting.shared, _others(meeting, tensors)
    grads = meeting.output.apart(grad)
    return {i: _unexpanded(grads * others[1 - i], tensors[i].shape)}


@register_rule(Tensor.expand, Tensor.expand_as)
def expansions(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """``input.expand(...)``: each sample has a copy."""
    if meeting.shared != (0,):
        return multiplied_out(meeting, grad, tensors)
    return {0: _unexpanded(meeting.output.apart(grad), tensors[0].shape)}
