"""One direction of one recurrent layer, by linear calls that the tap sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from fisherprune.persample.layers.linear import _Linear
from fisherprune.persample.layers.recurrent import through_time
from fisherprune.persample.layers.recurrent.sequences import Packed, Whole
from fisherprune.persample.layers.recurrent.steps import (
    Weights,
    run_gru,
    run_lstm,
    run_rnn,
)
from fisherprune.persample.registry import LayerCall, register_layer

States = tuple[Tensor, ...]
"""An LSTM's hidden and cell states, ``[N, *]`` each; of the others the hidden one."""


class _UnreadLinear(_Linear):
    """A linear layer whose output nobody reads: the steps have been run already."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return input.new_zeros(()).expand(*input.shape[:-1], len(weight))


@wrap_torch_function(lambda input, weight, bias=None: (input, weight, bias))
def recurrent_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return what has the gradient of a linear layer's output, and any values."""
    return F.linear(input, weight, bias)


@register_layer(recurrent_linear)
def _sort_out(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    layer = _UnreadLinear()
    return LayerCall(layer, input, weight, bias, weight_dims=2, is_read=False)


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
        self.sequences = sequences
        self.w_hh, self.b_hh, self.w_hr = w_hh, b_hh, w_hr
        self.ih = _linear(F.linear, x, w_ih, b_ih)
        self.states = tuple(self._meeting(state) for state in states)
        # Under autocast, linear layers return another dtype than their weights'.
        with torch.no_grad():
            values: list[Any] = [
                p if p is None else p.detach().to(self.ih) for p in (w_hh, b_hh, w_hr)
            ]
        self.weights = Weights(*values)

    def _meeting(self, state: Tensor) -> Tensor:
        """Return a state of samples, which one that comes from a parameter is not."""
        if not state.requires_grad:
            return state
        return state + 0 * self.ih[0, :, :1].detach()

    def _hh(self, hidden: Tensor) -> Tensor:
        """Return what gets the gradient of the linear map of the hidden states."""
        before = self.sequences.zero_padded(hidden[:-1])
        return _linear(recurrent_linear, before, self.w_hh, self.b_hh)

    def lstm(self) -> tuple[Tensor, ...]:
        """Return all hidden states and the last cell state."""
        (h0, c0), padding = self.states, self.sequences.padding
        hidden, *cells = run_lstm(self.ih, h0, c0, self.weights, padding)
        projected = None
        if self.w_hr is not None:
            _, gates, _, tanh = cells
            projected = _linear(recurrent_linear, gates[:, :, 3] * tanh, self.w_hr)
        grads_to = self.ih, self._hh(hidden), projected, h0, c0
        found: States = through_time.lstm(*grads_to, hidden, self.weights, *cells)
        return found

    def gru(self) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        hidden, *gates = run_gru(self.ih, self.states[0], self.weights)
        grads_to = self.ih, self._hh(hidden), *self.states
        return (through_time.gru(*grads_to, hidden, self.weights, *gates),)

    def rnn(self, is_relu: bool) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        hidden = run_rnn(self.ih, self.states[0], self.weights, is_relu)
        grads_to = self.ih, self._hh(hidden), *self.states
        return (through_time.rnn(*grads_to, hidden, self.weights, is_relu),)
