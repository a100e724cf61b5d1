"""Backward passes through time, with the gradient of what both linear maps returned.

Tensors are ``[T, N, features]``. ``ih`` and ``hh`` are the products of the inputs and
of the hidden states before each step. The steps have been run already, so nobody reads
the values of ``hh``. A backward pass has few calls per step: what does not depend on
the step after is computed for all steps at once. Its results have the samples first in
memory, as the linear layers that they go to. On the CPU an LSTM's is one op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fisherprune import ops
from fisherprune.persample.layers.recurrent.steps import (
    Weights,
    has_kernel,
    one_call,
    samples_first,
)

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class _RNN(torch.autograd.Function):
    """``h = tanh(ih + hh)``, or ``relu`` of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        ih: Tensor,
        hh: Tensor,
        h0: Tensor,
        hidden: Tensor,
        weights: Weights,
        is_relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weights.hidden)
        ctx.is_relu = is_relu
        return hidden[1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        h = hidden[1:]
        slope = (h > 0).to(grad) if ctx.is_relu else 1 - h.square()
        hidden_grad, delta = _steps_first(grad), _samples_first(h)
        for step, (d_hidden, each, d) in _backward(hidden_grad, slope, delta):
            torch.mul(d_hidden, each, out=d)
            if step:
                hidden_grad[step - 1].addmm_(d, weight)
        return delta, delta, delta[0] @ weight, None, None, None


class _GRU(torch.autograd.Function):
    """``h = n + z * (h_before - n)``, ``n = tanh(ih_n + r * hh_n)``.

    ``r`` and ``z`` are the sigmoids of the first two thirds of ``ih + hh``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ih: Tensor,
        hh: Tensor,
        h0: Tensor,
        hidden: Tensor,
        weights: Weights,
        *gates: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weights.hidden, *gates)
        return hidden[1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rz, n, hh_n = ctx.saved_tensors
        r, z = rz.chunk(2, -1)
        delta = _samples_first(n, 3)
        slope = _tanh_backward(1 - z, n)
        _sigmoid_backward(slope * hh_n, r, grad_input=delta[..., 0, :])
        _sigmoid_backward(hidden[:-1] - n, z, grad_input=delta[..., 1, :])
        torch.mul(slope, r, out=delta[..., 2, :])
        hidden_grad, rows = _steps_first(grad), delta.flatten(2)
        for step, (d_hidden, d, row, keep) in _backward(hidden_grad, delta, rows, z):
            d.mul_(d_hidden.unsqueeze(1))
            if step:
                hidden_grad[step - 1].addcmul_(keep, d_hidden).addmm_(row, weight)
        h0_grad = torch.addmm(z[0] * hidden_grad[0], rows[0], weight)
        ih_grad = delta.clone()
        torch.mul(slope, hidden_grad, out=ih_grad[..., 2, :])
        return ih_grad.flatten(2), rows, h0_grad, *(None for _ in range(5))


class _LSTM(torch.autograd.Function):
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
        hidden: Tensor,
        weights: Weights,
        cells: Tensor,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cells, weights.hidden, weights.projection, *gates)
        # In the order of steps, by which dropout draws its numbers.
        return _steps_first(hidden[1:]), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, last: Tensor) -> tuple[Tensor | None, ...]:
        cells, weight, projection, gates, g, tanh = ctx.saved_tensors
        if has_kernel(grad, projection):
            parts = cells, gates.flatten(2), tanh
            rows, *firsts = ops.lstm_backward(
                samples_first(grad),
                last.contiguous(),
                weight.contiguous(),
                *map(samples_first, parts),
            )
            rows = rows.transpose(0, 1)
            return rows, rows, None, *firsts, *(None for _ in range(6))
        i, f, _, o = gates.unbind(2)
        delta = _samples_first(g, 4)
        _sigmoid_backward(g, i, grad_input=delta[..., 0, :])
        _sigmoid_backward(cells[:-1], f, grad_input=delta[..., 1, :])
        _tanh_backward(i, g, grad_input=delta[..., 2, :])
        _sigmoid_backward(tanh, o, grad_input=delta[..., 3, :])
        slope = _tanh_backward(o, tanh)
        hidden_grad, d_cell, rows = _steps_first(grad), last.clone(), delta.flatten(2)
        parts = rows, delta[..., :3, :], delta[..., 3, :]
        for step, (d_hidden, each, forget, row, d_ifg, d_o) in _backward(
            hidden_grad, slope, f, *parts
        ):
            d_out = d_hidden if projection is None else d_hidden @ projection
            d_cell.addcmul_(d_out, each)
            d_ifg.mul_(d_cell.unsqueeze(1))
            d_o.mul_(d_out)
            d_cell.mul_(forget)
            if step:
                hidden_grad[step - 1].addmm_(row, weight)
        projected_grad = None if projection is None else hidden_grad
        starts = rows[0] @ weight, d_cell
        return rows, rows, projected_grad, *starts, *(None for _ in range(6))


def _steps_first(x: Tensor) -> Tensor:
    """Return a copy whose memory has the steps first."""
    return x.clone(memory_format=torch.contiguous_format)


def _samples_first(like: Tensor, *gates: int) -> Tensor:
    """Return an empty ``[T, N, *gates, H]`` whose memory has the samples first."""
    steps, n, size = like.shape
    return like.new_empty((n, steps, *gates, size)).transpose(0, 1)


def _backward(*tensors: Tensor) -> Sequence[tuple[int, tuple[Tensor, ...]]]:
    """Return the number of each step and the views of it, the last step first."""
    return list(enumerate(zip(*tensors, strict=True)))[::-1]


rnn, gru, lstm = (one_call(function.apply) for function in (_RNN, _GRU, _LSTM))
