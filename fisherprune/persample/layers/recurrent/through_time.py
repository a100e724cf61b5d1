"""Backward passes through time, with the gradient of what both linear maps returned.

Tensors are ``[T, N, features]``. ``ih`` and ``hh`` are the products of the inputs and of
the hidden states before each step, which are known, so ``hh`` has a gradient of its own
and no step depends on another one in the forward pass, but for an LSTM's cell states.
The backward passes have few calls per step: all that does not depend on the step after
is computed for all steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class RNN(torch.autograd.Function):
    """``h = tanh(ih + hh)``, or ``relu`` of it, where ``hidden`` holds h."""

    @staticmethod
    def forward(
        ctx: Any,
        ih: Tensor,
        hh: Tensor,
        h0: Tensor,
        hidden: Tensor,
        weight: Tensor,
        is_relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.is_relu = is_relu
        return hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        slope = (hidden > 0).to(grad) if ctx.is_relu else 1 - hidden.square()
        hidden_grad, delta = _steps_first(grad), slope
        for step, (d_hidden, d) in _backward(hidden_grad, delta):
            d.mul_(d_hidden)
            if step:
                hidden_grad[step - 1].addmm_(d, weight)
        return delta, delta, delta[0] @ weight, None, None, None


class GRU(torch.autograd.Function):
    """``h = n + z * (h_before - n)``, ``n = tanh(ih_n + r * hh_n)``.

    ``r`` and ``z`` are the sigmoids of the first two thirds of ``ih + hh``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ih: Tensor,
        hh: Tensor,
        h0: Tensor,
        before: Tensor,
        hidden: Tensor,
        weight: Tensor,
    ) -> Tensor:
        size = hidden.shape[-1]
        (ih_r, ih_z, ih_n), (hh_r, hh_z, hh_n) = ih.split(size, -1), hh.split(size, -1)
        r, z, n = (torch.empty_like(hidden) for _ in range(3))
        torch.add(ih_r, hh_r, out=r).sigmoid_()
        torch.add(ih_z, hh_z, out=z).sigmoid_()
        torch.addcmul(ih_n, r, hh_n, out=n).tanh_()
        ctx.save_for_backward(r, z, n, hh_n.clone(), before, weight)
        return hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        r, z, n, hh_n, before, weight = ctx.saved_tensors
        delta = r.new_empty((*r.shape[:-1], 3, r.shape[-1]))
        slope = _tanh_backward(1 - z, n)
        _sigmoid_backward(slope * hh_n, r, grad_input=delta[..., 0, :])
        _sigmoid_backward(before - n, z, grad_input=delta[..., 1, :])
        torch.mul(slope, r, out=delta[..., 2, :])
        hidden_grad, rows = _steps_first(grad), delta.flatten(-2)
        for step, (d_hidden, d, gate) in _backward(hidden_grad, delta, z):
            d.mul_(d_hidden.unsqueeze(1))
            if step:
                hidden_grad[step - 1].addcmul_(gate, d_hidden).addmm_(rows[step], weight)
        h0_grad = torch.addmm(z[0] * hidden_grad[0], rows[0], weight)
        ih_grad = delta.clone()
        torch.mul(slope, hidden_grad, out=ih_grad[..., 2, :])
        return ih_grad.flatten(-2), rows, h0_grad, None, None, None


def cell_states(
    ih: Tensor, hh: Tensor, c0: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an LSTM's gates ``i, f, g, o``, cell states from c0 on, and their tanh.

    Args:
        ih: ``[T, N, 4 * H]``.
        hh: of the same shape.
        c0: ``[N, H]``.
        padding: ``[T, N]``, true where a sequence has ended: the cell state stays.
    """
    steps, n, size = len(ih), *c0.shape
    gates = torch.add(ih, hh, out=ih.new_empty((steps, n, 4 * size)))
    gates[..., : 2 * size].sigmoid_()
    gates[..., 2 * size : 3 * size].tanh_()
    gates[..., 3 * size :].sigmoid_()
    gates = gates.view(steps, n, 4, size)
    if padding is not None:
        gates[padding] = gates.new_tensor([0.0, 1.0, 0.0, 0.0]).unsqueeze(-1)
    i, f, g, _ = gates.unbind(2)
    states = gates.new_empty((steps + 1, n, size))
    states[0] = c0
    torch.mul(i, g, out=states[1:])
    for forget, before, state in zip(f, states, states[1:], strict=False):
        state.addcmul_(forget, before)
    return gates, states, states[1:].tanh()


class LSTM(torch.autograd.Function):
    """``h = o * tanh(c)``, ``c = f * c_before + i * g``; returns h and the last c.

    With a projection, h is ``projected``, the product of ``o * tanh(c)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ih: Tensor,
        hh: Tensor,
        projected: Tensor | None,
        h0: Tensor,
        c0: Tensor,
        cells: tuple[Tensor, Tensor, Tensor],
        hidden: Tensor,
        weight: Tensor,
        projection: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*cells, weight, projection)
        return hidden.clone(), cells[1][-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, last: Tensor) -> tuple[Tensor | None, ...]:
        gates, states, tanh, weight, projection = ctx.saved_tensors
        i, f, g, o = gates.unbind(2)
        delta = torch.empty_like(gates)
        _sigmoid_backward(g, i, grad_input=delta[..., 0, :])
        _sigmoid_backward(states[:-1], f, grad_input=delta[..., 1, :])
        _tanh_backward(i, g, grad_input=delta[..., 2, :])
        _sigmoid_backward(tanh, o, grad_input=delta[..., 3, :])
        slope = _tanh_backward(o, tanh)
        hidden_grad, state_grad = _steps_first(grad), last.clone()
        rows = delta.flatten(-2)
        steps = _backward(hidden_grad, delta[..., :3, :], delta[..., 3, :], slope, f)
        for step, (d_hidden, d_ifg, d_o, each, forget) in steps:
            d_cell = d_hidden if projection is None else d_hidden @ projection
            state_grad.addcmul_(d_cell, each)
            d_ifg.mul_(state_grad.unsqueeze(1))
            d_o.mul_(d_cell)
            state_grad.mul_(forget)
            if step:
                hidden_grad[step - 1].addmm_(rows[step], weight)
        projected_grad = None if projection is None else hidden_grad
        states_grad = rows[0] @ weight, state_grad
        return rows, rows, projected_grad, *states_grad, None, None, None, None


def _steps_first(grad: Tensor) -> Tensor:
    """Return a copy whose memory has the steps first."""
    return grad.clone(memory_format=torch.contiguous_format)


def _backward(*tensors: Tensor) -> Sequence[tuple[int, tuple[Tensor, ...]]]:
    """Return the number of each step and the views of it, the last step first."""
    views = zip(*(t.unbind(0) for t in tensors), strict=True)
    return list(enumerate(views))[::-1]
