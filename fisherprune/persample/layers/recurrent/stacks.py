"""LSTM, GRU and RNN of any number of layers, directions and sequence lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.layers.base import register_rewrite
from fisherprune.persample.layers.recurrent import through_time
from fisherprune.persample.layers.recurrent.sequences import (
    Packed,
    Whole,
    order_of_rows,
)

States = tuple[Tensor, ...]
"""An LSTM's hidden and cell states, ``[N, *]`` each; of the others the hidden one."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to ``[T, N, in]``, with the samples first for the tap."""
    return F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)


class Direction:
    """One direction of one layer, over sequences ``x`` whose first step comes first.

    Args:
        function: ``torch.lstm`` or another one.
        x: ``[T, N, in]``.
        states: before the first step.
        weights: as nn.LSTM has them: W_ih, W_hh, b_ih, b_hh, W_hr, without those that
            the layer has not.
        has_biases: whether there are b_ih and b_hh.
        sequences: where they end.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        x: Tensor,
        states: States,
        weights: Sequence[Tensor],
        has_biases: bool,
        sequences: Whole | Packed,
    ) -> None:
        w_ih, w_hh, *rest = weights
        b_ih, b_hh, *rest = rest if has_biases else (None, None, *rest)
        self.projection = rest[0] if rest else None
        self.states, self.sequences = states, sequences
        self.ih = linear(x, w_ih, b_ih)
        self.weight = w_hh.detach().to(self.ih.dtype)
        self.hidden = self._hidden(function, x, weights, has_biases).to(self.ih.dtype)
        h0 = states[0].detach().to(self.ih.dtype).unsqueeze(0)
        self.before = sequences.zero_padded(torch.cat([h0, self.hidden[:-1]]))
        self.hh = linear(self.before, w_hh, b_hh)

    @torch.no_grad()
    def _hidden(
        self,
        function: Callable[..., Any],
        x: Tensor,
        weights: Sequence[Tensor],
        has_biases: bool,
    ) -> Tensor:
        """Return the hidden states after each step, ``[T, N, out]``, by PyTorch."""
        states = [state.unsqueeze(0) for state in self.states]
        state = states if len(states) > 1 else states[0]
        cut_off = [weight.detach() for weight in weights]  # which nobody watches
        options = has_biases, 1, 0.0, False, False, False
        hidden: Tensor = function(x, state, cut_off, *options)[0]
        return hidden

    def lstm(self) -> tuple[Tensor, ...]:
        """Return all hidden states and the last cell state."""
        with torch.no_grad():
            cells = through_time.cell_states(
                self.ih, self.hh, self.states[1], self.sequences.padding
            )
        projected = projection = None
        if self.projection is not None:
            projected = linear(cells[0][:, :, 3] * cells[2], self.projection)
            projection = self.projection.detach().to(projected.dtype)
        result: tuple[Tensor, ...] = through_time.LSTM.apply(
            self.ih,
            self.hh,
            projected,
            *self.states,
            cells,
            self.hidden,
            self.weight,
            projection,
        )
        return result

    def gru(self) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        values = self.before, self.hidden, self.weight
        return (through_time.GRU.apply(self.ih, self.hh, *self.states, *values),)

    def rnn(self, is_relu: bool) -> tuple[Tensor, ...]:
        """Return all hidden states."""
        values = self.hidden, self.weight, is_relu
        return (through_time.RNN.apply(self.ih, self.hh, *self.states, *values),)


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
                found = Direction(
                    self.function,
                    turned(x),
                    own_states[i],
                    parts[i],
                    self.has_biases,
                    sequences,
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
