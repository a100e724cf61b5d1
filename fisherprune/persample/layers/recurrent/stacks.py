"""LSTM, GRU and RNN of any number of layers, directions and sequence lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from fisherprune.persample.layers.base import (
    LayerCall,
    register_layer,
    register_rewrite,
)
from fisherprune.persample.layers.linear import Linear
from fisherprune.persample.layers.recurrent.sequences import (
    Packed,
    Whole,
    order_of_rows,
)
from fisherprune.persample.layers.recurrent.steps import (
    Weights,
    run_gru,
    run_lstm,
    run_rnn,
)
from fisherprune.persample.layers.recurrent.through_time import GRU, LSTM, RNN

States = tuple[Tensor, ...]
"""An LSTM's hidden and cell states, ``[N, *]`` each; of the others the hidden one."""


def linear(function: Callable[..., Tensor], x: Tensor, *operands: Any) -> Tensor:
    """Apply a linear function to ``[T, N, in]``, with the samples first for the tap."""
    return function(x.transpose(0, 1), *operands).transpose(0, 1)


class _NamedProduct(Linear):
    """A linear layer whose output nobody reads: the steps were run already."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return input.new_zeros(()).expand(*input.shape[:-1], len(weight))


@wrap_torch_function(lambda input, weight, bias=None: (input, weight, bias))
def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return an output whose gradient tells those of weight and bias."""
    return F.linear(input, weight, bias)


@register_layer(_product)
def _sort_out(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    return LayerCall(_NamedProduct(), input, weight, bias, weight_dims=2)


@dataclass(frozen=True)
class Direction:
    """One direction of one layer, over sequences ``x`` whose first step comes first.

    Attributes:
        x: ``[T, N, in]``.
        states: before the first step.
        w_ih, w_hh, b_ih, b_hh: the two linear maps.
        w_hr: an LSTM's projection.
        sequences: where they end.
    """

    x: Tensor
    states: States
    sequences: Whole | Packed
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    def _start(self, steps: int, state: Tensor, like: Tensor) -> Tensor:
        """Return a buffer for a state before each step, and after all."""
        buffer = like.new_empty((steps + 1, *state.shape))
        buffer[0] = state.detach()
        return buffer

    def _weights(self, dtype: torch.dtype) -> Weights:
        """Return what the steps need; under autocast, in another dtype."""
        operands = self.w_hh, self.b_hh, self.w_hr
        return Weights(*(p if p is None else p.detach().to(dtype) for p in operands))

    def lstm(self) -> tuple[Tensor, ...]:
        """Return all hidden states and the last cell state."""
        ih = linear(F.linear, self.x, self.w_ih, self.b_ih)
        weights = self._weights(ih.dtype)
        hidden, cells = (self._start(len(ih), state, ih) for state in self.states)
        with torch.no_grad():
            padding = self.sequences.padding
            gates = run_lstm(ih, hidden, cells, weights, padding)
        projected = None
        if self.w_hr is not None:
            projected = linear(_product, gates[0][:, :, 3] * gates[2], self.w_hr)
        values = hidden, cells, weights, gates
        hh = self._hidden_product(hidden)
        return LSTM.apply(ih, hh, projected, *self.states, *values)

    def gru(self) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        ih = linear(F.linear, self.x, self.w_ih, self.b_ih)
        weights = self._weights(ih.dtype)
        hidden = self._start(len(ih), self.states[0], ih)
        with torch.no_grad():
            gates = run_gru(ih, hidden, weights)
        hh = self._hidden_product(hidden)
        return (GRU.apply(ih, hh, *self.states, hidden, weights, gates),)

    def rnn(self, is_relu: bool) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        ih = linear(F.linear, self.x, self.w_ih, self.b_ih)
        weights = self._weights(ih.dtype)
        hidden = self._start(len(ih), self.states[0], ih)
        with torch.no_grad():
            run_rnn(ih, hidden, weights, is_relu)
        hh = self._hidden_product(hidden)
        return (RNN.apply(ih, hh, *self.states, hidden, weights, is_relu),)

    def _hidden_product(self, hidden: Tensor) -> Tensor:
        before = self.sequences.zero_padded(hidden[:-1])
        return linear(_product, before, self.w_hh, self.b_hh)


DIRECTIONS: dict[Callable[..., Any], Callable[[Direction], tuple[Tensor, ...]]] = {
    torch.lstm: Direction.lstm,
    torch.gru: Direction.gru,
    torch.rnn_tanh: partial(Direction.rnn, is_relu=False),
    torch.rnn_relu: partial(Direction.rnn, is_relu=True),
}


@dataclass(frozen=True)
class Stack:
    """A call's options, as ``torch.lstm`` has them, and what runs a direction."""

    function: Callable[..., Any]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool

    def run(
        self,
        x: Tensor,
        states: States,
        weights: Sequence[Tensor],
        sequences: Whole | Packed,
    ) -> tuple[Tensor, ...]:
        """Return the outputs ``[T, N, *]`` and the last states.

        Args:
            x: ``[T, N, in]``.
            states: before the first steps, ``[layers * directions, N, *]`` each.
            weights: of all layers and directions, one after the other.
            sequences: where they end.
        """
        directions = 2 if self.bidirectional else 1
        size = len(weights) // (self.num_layers * directions)
        parts = [weights[i : i + size] for i in range(0, len(weights), size)]
        own_states = list(zip(*(state.unbind(0) for state in states), strict=True))
        lasts = []
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.train)
            outputs = []
            for direction in range(directions):
                i = layer * directions + direction
                turned = sequences.reversed if direction else _same
                w_ih, w_hh, *rest = parts[i]
                b_ih, b_hh, *rest = rest if self.has_biases else (None, None, *rest)
                found = Direction(
                    turned(x), own_states[i], sequences, w_ih, w_hh, b_ih, b_hh, *rest
                )
                hidden, *last = DIRECTIONS[self.function](found)
                lasts.append((sequences.last(hidden), *last))
                outputs.append(sequences.zero_padded(turned(hidden)))
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return x, *(torch.stack(states) for states in zip(*lasts, strict=True))


def _same(x: Tensor) -> Tensor:
    return x


def _whole(
    function: Callable[..., Any],
    input: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    x = input.transpose(0, 1) if batch_first else input
    stack = Stack(function, has_biases, num_layers, dropout, train, bidirectional)
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    x, *lasts = stack.run(x, states, params, Whole())
    return x.transpose(0, 1) if batch_first else x, *lasts


def _packed(
    function: Callable[..., Any],
    data: Tensor,
    batch_sizes: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    order = order_of_rows(function.__name__)
    sequences = Packed(batch_sizes, order, data.device)
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    by_sample = tuple(sequences.by_sample(state) for state in states)
    stack = Stack(function, has_biases, num_layers, dropout, train, bidirectional)
    x, *lasts = stack.run(sequences.unpack(data), by_sample, params, sequences)
    return sequences.pack(x), *(sequences.by_length(last) for last in lasts)


def _rewrite(function: Callable[..., Any]) -> None:
    """Make one of PyTorch's two functions of one name known; arguments tell which."""

    @register_rewrite(function)
    def rewrite(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if "batch_sizes" in kwargs or len(args) > 3 and not isinstance(args[3], bool):
            return _packed(function, *args, **kwargs)
        return _whole(function, *args, **kwargs)


for _function in DIRECTIONS:
    _rewrite(_function)
