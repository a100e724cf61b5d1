"""One direction of one recurrent layer, by linear calls that the tap sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from fisherprune.persample.layers.base import LayerCall, register_layer
from fisherprune.persample.layers.linear import _Linear
from fisherprune.persample.layers.recurrent import through_time
from fisherprune.persample.layers.recurrent.sequences import Packed, Whole
from fisherprune.persample.layers.recurrent.steps import (
    Weights,
    run_gru,
    run_lstm,
    run_rnn,
)

States = tuple[Tensor, ...]
"""An LSTM's hidden and cell states, ``[N, *]`` each; of the others the hidden one."""


class _UnreadLinear(_Linear):
    """A linear layer whose output nobody reads: the steps have been run already."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return input.new_zeros(()).expand(*input.shape[:-1], len(weight))


@wrap_torch_function(lambda input, weight, bias=None: (input, weight, bias))
def _unread_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what has the gradient of a linear layer's output, and any values."""
    return F.linear(input, weight, bias)


@register_layer(_unread_linear)
def _sort_out(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    return LayerCall(_UnreadLinear(), input, weight, bias, weight_dims=2)


def _linear(function: Callable[..., Tensor], x: Tensor, *operands: Any) -> Tensor:
    """Apply a linear function to ``[T, N, in]``, with the samples first for the tap."""
    return function(x.transpose(0, 1), *operands).transpose(0, 1)


class Direction:
    """One direction of one layer.

    Args:
        x: ``[T, N, in]``, the step that is taken first in front.
        states: before it.
        sequences: where they end.
        w_ih: of the linear map of the inputs.
        w_hh: of that of the hidden states.
        b_ih: as nn.LSTM has it.
        b_hh: as nn.LSTM has it.
        w_hr: an LSTM's projection.
    """

    def __init__(
        self,
        x: Tensor,
        states: States,
        sequences: Whole | Packed,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
        w_hr: Tensor | None = None,
    ) -> None:
        self.states, self.sequences = states, sequences
        self.w_hh, self.b_hh, self.w_hr = w_hh, b_hh, w_hr
        self.ih = _linear(F.linear, x, w_ih, b_ih)
        # Under autocast, linear layers return another dtype than their weights'.
        values: list[Any] = [
            p if p is None else p.detach().to(self.ih) for p in (w_hh, b_hh, w_hr)
        ]
        self.weights = Weights(*values)
        self.hidden = self._buffer(states[0])

    def _buffer(self, start: Tensor) -> Tensor:
        """Return room for a state before each step and after the last one."""
        buffer = self.ih.new_empty((len(self.ih) + 1, *start.shape))
        buffer[0] = start.detach()
        return buffer

    def _hh(self) -> Tensor:
        """Return what gets the gradient of the linear map of the hidden states."""
        before = self.sequences.zero_padded(self.hidden[:-1])
        return _linear(_unread_linear, before, self.w_hh, self.b_hh)

    def lstm(self) -> tuple[Tensor, ...]:
        """Return all hidden states and the last cell state."""
        cells, padding = self._buffer(self.states[1]), self.sequences.padding
        with torch.no_grad():
            gates = run_lstm(self.ih, self.hidden, cells, self.weights, padding)
        projected = None
        if self.w_hr is not None:
            outputs = gates[0][:, :, 3] * gates[2]
            projected = _linear(_unread_linear, outputs, self.w_hr)
        known = self.hidden, cells, self.weights, gates
        found: States = through_time.lstm(
            self.ih, self._hh(), projected, *self.states, *known
        )
        return found

    def gru(self) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        with torch.no_grad():
            gates = run_gru(self.ih, self.hidden, self.weights)
        known = self.hidden, self.weights, gates
        return (through_time.gru(self.ih, self._hh(), *self.states, *known),)

    def rnn(self, is_relu: bool) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        with torch.no_grad():
            run_rnn(self.ih, self.hidden, self.weights, is_relu)
        known = self.hidden, self.weights, is_relu
        return (through_time.rnn(self.ih, self._hh(), *self.states, *known),)
