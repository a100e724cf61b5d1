"""Recurrent layers step by step, without autograd.

All tensors are of all steps, ``[T, N, features]``: ``ih`` is ``W_ih x + b_ih``, and
``hidden``, ``[T + 1, N, features]``, has the state h0 before the first step in front.
Buffers are written in place, so that a step has few and small calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """W_hh, b_hh and an LSTM's W_hr, cut off from autograd."""

    hidden: Tensor
    bias: Tensor | None
    projection: Tensor | None = None


def run_rnn(ih: Tensor, hidden: Tensor, weights: Weights, is_relu: bool) -> None:
    """Write the hidden states ``tanh(ih + hh)``, or ``relu`` of the sum."""
    weight, bias = weights.hidden.t(), weights.bias
    for x, before, h in zip(ih, hidden, hidden[1:], strict=False):
        torch.addmm(x, before, weight, out=h)
        if bias is not None:
            h += bias
        h.relu_() if is_relu else h.tanh_()


def run_gru(
    ih: Tensor, hidden: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the hidden states ``n + z * (h_before - n)``.

    Returns:
        r and z, ``[T, N, 2 * H]``, n, and the last third of ``W_hh h_before + b_hh``.
    """
    (steps, n, rows), size = ih.shape, hidden.shape[-1]
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
    return gates, new, hh[..., 2 * size :]


def run_lstm(
    ih: Tensor, hidden: Tensor, cells: Tensor, weights: Weights, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the cell states ``f * c_before + i * g`` and hidden ones ``o * tanh(c)``.

    Where ``padding`` ``[T, N]`` is true, the cell state stays.

    Returns:
        the gates ``[T, N, 4, H]``, i and f first and o last; g; and the cells' tanh.
    """
    (steps, n, _), size = ih.shape, cells.shape[-1]
    weight, bias, projection = weights.hidden.t(), weights.bias, weights.projection
    if padding is not None:
        inf = float("inf")
        shut = ih.new_tensor([-inf, inf, 0, -inf]).repeat_interleave(size)
        ih = torch.where(padding.unsqueeze(-1), shut, ih)
    gates = ih.new_empty((steps, n, 4, size))
    new, tanh = ih.new_empty((steps, n, size)), ih.new_empty((steps, n, size))
    i, f, _, o = gates.unbind(2)
    products = zip(ih, gates.flatten(2), hidden, new, strict=False)
    states = zip(i, f, o, cells, cells[1:], tanh, hidden[1:], strict=False)
    for (x, row, h_before, g), (i, f, o, before, c, out, h) in zip(
        products, states, strict=True
    ):
        torch.addmm(x, h_before, weight, out=row)
        if bias is not None:
            row += bias
        torch.tanh(row[:, 2 * size : 3 * size], out=g)
        row.sigmoid_()
        torch.mul(i, g, out=c).addcmul_(f, before)
        torch.tanh(c, out=out)
        if projection is None:
            torch.mul(o, out, out=h)
        else:
            torch.mm(o * out, projection.t(), out=h)
    return gates, new, tanh
