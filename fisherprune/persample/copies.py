"""Calls for which there is no rule: each sample has a copy of the shared tensors.

The function runs by vmap, for one sample with its copy. So autograd, on its ordinary
way back, finds the gradients of all copies, which are those of single samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.function import once_differentiable

from fisherprune.persample.contributions import STREAM_BYTES, Rows
from fisherprune.persample.layout import Layout
from fisherprune.persample.meeting import Meeting

if TYPE_CHECKING:
    from fisherprune.persample.call_tap import CallTap


class Copies(torch.autograd.Function):
    """A copy of a shared tensor for each sample, none of which takes memory."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shared: Sequence[Tensor], tap: Any) -> Tensor:
        """Return ``[N, *shape]``; ``shared`` is one tensor, whose gradient is cut."""
        (tensor,) = shared
        ctx.shared, ctx.tap = (id(tensor),), tap
        return tensor.detach().expand(tap.samples, *tensor.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        """Tell the tap."""
        tap, (shared,) = ctx.tap, ctx.shared
        tap.check_running(shared)
        layout = Layout(0, tap.samples)
        if not tap.is_checking(ctx, layout, grad, ctx.shared) and tap.wants(shared):
            tap.collect(shared, Rows(grad))
        return None, None, None


def has_room(samples: int, shared: Iterable[Tensor]) -> bool:
    """Return whether the gradients of all copies take little memory."""
    return 4 * samples * sum(each.numel() for each in shared) <= STREAM_BYTES


def run_with_copies(
    meeting: Meeting, tensors: Sequence[Tensor], tap: CallTap
) -> Tensor | None:
    """Return a call's result, or None where vmap can't run it."""
    assert isinstance(meeting.output, Layout)
    given = list(tensors)
    for i, layout in enumerate(meeting.layouts):
        if i in meeting.shared:
            given[i] = Copies.apply(tap.anchor, [tensors[i]], tap)
        elif layout:
            given[i] = layout.apart(tensors[i])
    batched = [
        i in meeting.shared or layout is not None
        for i, layout in enumerate(meeting.layouts)
    ]
    try:
        output = _vmapped(meeting.call, given, batched, tap.samples)
        return meeting.output.together(output)
    except (RuntimeError, NotImplementedError):
        return None


def _vmapped(
    run: Callable[[Sequence[Tensor]], Tensor],
    tensors: Sequence[Tensor],
    batched: Sequence[bool],
    samples: int,
) -> Tensor:
    """Run a function by ``torch.func.vmap`` over the first axes of some tensors.

    That flattens arguments by functions that refer to themselves, whose cycles keep
    the tensors until Python collects garbage; and it takes as long as several calls.
    """
    _load_vmap()
    level = _functorch._vmap_increment_nesting(samples, "error")
    try:
        own = [
            _functorch._add_batch_dim(tensor, 0, level) if is_batched else tensor
            for tensor, is_batched in zip(tensors, batched, strict=True)
        ]
        return _functorch._remove_batch_dim(run(own), level, samples, 0)
    finally:
        _functorch._vmap_decrement_nesting()


@cache
def _load_vmap() -> None:
    """Have PyTorch load what its vmap knows of functions, as its first run does."""
    torch.func.vmap(torch.neg)(torch.zeros(1, device="cpu"))
