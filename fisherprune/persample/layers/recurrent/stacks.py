"""LSTM, GRU and RNN of any number of layers, directions and sequence lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.layers.recurrent.directions import Direction, States
from fisherprune.persample.layers.recurrent.sequences import (
    Packed,
    Whole,
    order_of_rows,
)
from fisherprune.persample.registry import register_rewrite

Run = Callable[[Direction], tuple[Tensor, ...]]
"""Returns the hidden states after each step, and an LSTM's last cell state."""


@dataclass(frozen=True)
class Stack:
    """The layers of a call, with the options that ``torch.lstm`` has."""

    run_direction: Run
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
        own = list(zip(zip(*states, strict=True), parts, strict=True))
        lasts: list[States] = []
        for layer in range(0, len(own), directions):
            if layer:
                x = F.dropout(x, self.dropout, self.train)
            x = self._layer(x, own[layer : layer + directions], sequences, lasts)
        return x, *(torch.stack(each) for each in zip(*lasts, strict=True))

    def _layer(
        self,
        x: Tensor,
        directions: Sequence[tuple[States, Sequence[Tensor]]],
        sequences: Whole | Packed,
        lasts: list[States],
    ) -> Tensor:
        """Return a layer's outputs, and append its last states to ``lasts``."""
        outputs = []
        for turned, (states, weights) in zip(
            (_same, sequences.reversed), directions, strict=False
        ):
            operands = self._operands(weights)
            direction = Direction(turned(x), states, sequences, *operands)
            hidden, *last = self.run_direction(direction)
            lasts.append((sequences.last(hidden), *last))
            outputs.append(sequences.zero_padded(turned(hidden)))
        return torch.cat(outputs, -1) if self.bidirectional else outputs[0]

    def _operands(self, weights: Sequence[Any]) -> Sequence[Any]:
        """Return W_ih, W_hh, b_ih, b_hh, the two or None, and an LSTM's W_hr."""
        w_ih, w_hh, *rest = weights
        return weights if self.has_biases else (w_ih, w_hh, None, None, *rest)


def _same(x: Tensor) -> Tensor:
    return x


def _states(hx: Tensor | Sequence[Tensor]) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _whole(
    run_direction: Run,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    stack = Stack(run_direction, has_biases, num_layers, dropout, train, bidirectional)
    x = input.transpose(0, 1) if batch_first else input
    x, *lasts = stack.run(x, _states(hx), params, Whole())
    return x.transpose(0, 1) if batch_first else x, *lasts


def _packed(
    run_direction: Run,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    stack = Stack(run_direction, has_biases, num_layers, dropout, train, bidirectional)
    sequences = Packed(batch_sizes, order_of_rows(), data.device)
    by_sample = tuple(sequences.by_sample(state) for state in _states(hx))
    x, *lasts = stack.run(sequences.unpack(data), by_sample, params, sequences)
    return sequences.pack(x), *(sequences.by_length(last) for last in lasts)


def _rewrite(function: Callable[..., Any], run_direction: Run) -> None:
    """Make both functions of one name known: their arguments tell which is called."""

    @register_rewrite(function)
    def rewrite(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        packed = "batch_sizes" in kwargs or not isinstance(args[3], bool)
        return (_packed if packed else _whole)(run_direction, *args, **kwargs)


_rewrite(torch.lstm, Direction.lstm)
_rewrite(torch.gru, Direction.gru)
_rewrite(torch.rnn_tanh, partial(Direction.rnn, is_relu=False))
_rewrite(torch.rnn_relu, partial(Direction.rnn, is_relu=True))
