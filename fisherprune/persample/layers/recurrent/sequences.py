"""The steps of a batch of sequences: of one length, or packed.

A packed batch, ``[sum of lengths, features]``, has the first step of all samples, then
the second step of those that have one. Samples are sorted by length: recurrent modules
know their order, functions don't.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError

_FORWARDS = [kind.forward.__code__ for kind in (nn.LSTM, nn.GRU, nn.RNN)]


@dataclass(frozen=True)
class Whole:
    """Sequences of one length, ``[T, N, features]``.

    Attributes:
        padding: ``[T, N]``, true behind a sequence's end; None: nowhere.
    """

    padding: Tensor | None = None

    def reversed(self, x: Tensor) -> Tensor:
        """Return the steps from the last one to the first one."""
        return x.flip(0)

    def last(self, x: Tensor) -> Tensor:
        """Return each sequence's last step, ``[N, features]``."""
        return x[-1]

    def zero_padded(self, x: Tensor) -> Tensor:
        """Return x with zeros behind the sequences' ends."""
        return x


class Packed:
    """Sequences of several lengths, padded to the longest one's.

    Args:
        batch_sizes: ``[T]``, how many samples have each step.
        order: ``[N]``, the sample of each row of the packed batch; None: as they come.
        device: of the sequences.
    """

    def __init__(
        self, batch_sizes: Tensor, order: Tensor | None, device: torch.device
    ) -> None:
        sizes = batch_sizes.to(device).unsqueeze(1)
        self.shape = len(batch_sizes), int(batch_sizes[0])
        rows = torch.arange(self.shape[1], device=device)
        self.order = rows if order is None else order
        step, row = (sizes > rows).nonzero(as_tuple=True)
        self.places = step * self.shape[1] + self.order[row]
        padding = torch.ones(self.shape, dtype=torch.bool, device=device)
        padding.view(-1)[self.places] = False
        self.padding = padding
        self.lengths = self.shape[0] - padding.sum(0)

    def unpack(self, data: Tensor) -> Tensor:
        """``[sum of lengths, features] -> [T, N, features]``, zeros as padding."""
        padded = data.new_zeros((self.padding.numel(), data.shape[-1]))
        return padded.index_copy(0, self.places, data).unflatten(0, self.shape)

    def pack(self, x: Tensor) -> Tensor:
        """``[T, N, features] -> [sum of lengths, features]``."""
        return x.flatten(0, 1).index_select(0, self.places)

    def by_sample(self, state: Tensor) -> Tensor:
        """Bring ``[*, N, features]`` from the packed batch's order into the batch's."""
        return state.index_select(1, self.order.argsort())

    def by_length(self, state: Tensor) -> Tensor:
        """Bring ``[*, N, features]`` into the packed batch's order."""
        return state.index_select(1, self.order)

    def reversed(self, x: Tensor) -> Tensor:
        """Return each sequence's steps from its last one to the first one."""
        steps = torch.arange(len(x), device=x.device).unsqueeze(1)
        place = torch.where(self.padding, steps, self.lengths - 1 - steps)
        return x.gather(0, place.unsqueeze(-1).expand_as(x))

    def last(self, x: Tensor) -> Tensor:
        """Return each sequence's last step, ``[N, features]``."""
        place = (self.lengths - 1).view(1, -1, 1).expand(1, *x.shape[1:])
        return x.gather(0, place).squeeze(0)

    def zero_padded(self, x: Tensor) -> Tensor:
        """Return x with zeros behind the sequences' ends."""
        return x.masked_fill(self.padding.unsqueeze(-1), 0)


def order_of_rows() -> Tensor | None:
    """Return the sample of each row of the packed batch that a module passes.

    The module has sorted the samples, or got them sorted, and does not tell the
    function that it calls, so its frame is asked. None: they come in their order.

    Raises:
        FisherpruneError: where no module of ``torch.nn`` calls the function.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _FORWARDS:
            order: Tensor | None = frame.f_locals["sorted_indices"]
            return order
        frame = frame.f_back
    raise FisherpruneError(
        "packed sequences must be passed by nn.LSTM, nn.GRU or nn.RNN, which know "
        "which row is which sample, got a direct call of torch.lstm, gru or rnn"
    )
