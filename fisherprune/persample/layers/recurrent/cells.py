"""LSTMCell, GRUCell and RNNCell: a step of linear layers and what joins them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.registry import register_rewrite


@register_rewrite(torch.lstm_cell)
def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewrite ``torch.lstm_cell``."""
    hidden, cell = hx
    gates = F.linear(input, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


@register_rewrite(torch.gru_cell)
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """Rewrite ``torch.gru_cell``."""
    ih_r, ih_z, ih_n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    hh_r, hh_z, hh_n = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    new = (ih_n + (ih_r + hh_r).sigmoid() * hh_n).tanh()
    return new + (ih_z + hh_z).sigmoid() * (hx - new)


@register_rewrite(torch.rnn_tanh_cell)
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """Rewrite ``torch.rnn_tanh_cell``."""
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).tanh()


@register_rewrite(torch.rnn_relu_cell)
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """Rewrite ``torch.rnn_relu_cell``."""
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).relu()
