"""Recurrent layers step by step, without autograd.

All tensors are of all steps, ``[T, N, features]``: ``ih`` is ``W_ih x + b_ih``, and the
states, ``[T + 1, N, features]``, have the one before the first step in front. Buffers
are written in place, so that a step has few and small calls. The tap sees one call.
On the CPU the steps of an LSTM are one op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

from fisherprune import ops

Run = TypeVar("Run", bound=Callable[..., Any])


def one_call(run: Run) -> Run:
    """Let the tap see a call of the function, and none of those inside of it."""
    wrapped: Any = wrap_torch_function(lambda ih, *others: (ih,))(run)
    return wrapped


@dataclass(frozen=True)
class Weights:
    """W_hh, b_hh and an LSTM's W_hr, cut off from autograd."""

    hidden: Tensor
    bias: Tensor | None
    projection: Tensor | None = None


def _with(bias: Tensor | None, ih: Tensor) -> Tensor:
    """Return the sum, for all steps at once."""
    return ih if bias is None else ih + bias


def _states(ih: Tensor, start: Tensor) -> Tensor:
    """Return room for a state before each step and after the last one."""
    buffer = ih.new_empty((len(ih) + 1, *start.shape))
    buffer[0] = start
    return buffer


@one_call
@torch.no_grad()
def run_rnn(ih: Tensor, h0: Tensor, weights: Weights, is_relu: bool) -> Tensor:
    """Return the hidden states ``tanh(ih + hh)``, or ``relu`` of the sum."""
    hidden = _states(ih, h0)
    weight = weights.hidden.t()
    ih = _with(weights.bias, ih)
    for x, before, h in zip(ih, hidden, hidden[1:], strict=False):
        torch.addmm(x, before, weight, out=h)
        h.relu_() if is_relu else h.tanh_()
    return hidden


@one_call
@torch.no_grad()
def run_gru(
    ih: Tensor, h0: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the hidden states ``n + z * (h_before - n)``, and what they come from.

    These are r and z, ``[T, N, 2 * H]``, n, and hh's last third.
    """
    hidden, (steps, n, rows), size = _states(ih, h0), ih.shape, h0.shape[-1]
    weight, bias = weights.hidden.t(), weights.bias
    hh = ih.new_empty((steps, n, rows))
    gates, new = ih.new_empty((steps, n, 2 * size)), ih.new_empty((steps, n, size))
    for x, y, rz, fresh, before, h in zip(
        ih, hh, gates, new, hidden, hidden[1:], strict=False
    ):
        if bias is None:
            torch.mm(before, weight, out=y)
        else:
            torch.addmm(bias, before, weight, out=y)
        torch.add(x[:, : 2 * size], y[:, : 2 * size], out=rz).sigmoid_()
        torch.addcmul(
            x[:, 2 * size :], rz[:, :size], y[:, 2 * size :], out=fresh
        ).tanh_()
        torch.lerp(fresh, before, rz[:, size:], out=h)
    return hidden, gates, new, hh[..., 2 * size :]


Cells = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def has_kernel(like: Tensor, projection: Tensor | None) -> bool:
    """Return whether the op ``lstm`` takes the steps."""
    return projection is None and like.is_cpu and like.dtype == torch.float32


def samples_first(x: Tensor) -> Tensor:
    """``[T, N, *] -> [N, T, *]``, contiguous."""
    return x.transpose(0, 1).contiguous()


@one_call
@torch.no_grad()
def run_lstm(
    ih: Tensor, h0: Tensor, c0: Tensor, weights: Weights, padding: Tensor | None
) -> Cells:
    """Return the states ``o * tanh(c)`` and c, ``f * c_before + i * g``, and parts.

    These are the gates ``[T, N, 4, H]``, i and f first and o last; g; and tanh(c).
    Where ``padding`` ``[T, N]`` is true, the cell state stays.
    """
    size = c0.shape[-1]
    if padding is not None:
        inf = float("inf")
        shut = ih.new_tensor([-inf, inf, 0, -inf]).repeat_interleave(size)
        ih = torch.where(padding.unsqueeze(-1), shut, ih)
    if has_kernel(ih, weights.projection):
        starts = h0.contiguous(), c0.contiguous()
        operands = weights.hidden.contiguous(), weights.bias
        found = ops.lstm(samples_first(ih), *starts, *operands)
        hidden, cells, gates, tanh = (each.transpose(0, 1) for each in found)
        gates = gates.unflatten(-1, (4, size))
        return hidden, cells, gates, gates[:, :, 2], tanh
    hidden, cells = _states(ih, h0), _states(ih, c0)
    steps, n, _ = ih.shape
    weight, projection = weights.hidden.t(), weights.projection
    ih = _with(weights.bias, ih)
    gates = ih.new_empty((steps, n, 4, size))
    new, tanh = ih.new_empty((steps, n, size)), ih.new_empty((steps, n, size))
    i, f, _, o = gates.unbind(2)
    products = zip(ih, gates.flatten(2), hidden, new, strict=False)
    states = zip(i, f, o, cells, cells[1:], tanh, hidden[1:], strict=False)
    for (x, row, h_before, g), (i, f, o, before, c, out, h) in zip(
        products, states, strict=True
    ):
        torch.addmm(x, h_before, weight, out=row)
        torch.tanh(row[:, 2 * size : 3 * size], out=g)
        row.sigmoid_()
        torch.mul(i, g, out=c).addcmul_(f, before)
        torch.tanh(c, out=out)
        if projection is None:
            torch.mul(o, out, out=h)
        else:
            torch.mm(o * out, projection.t(), out=h)
    return hidden, cells, gates, new, tanh
