"""The run of one sample alone: what its calls read, to find samples in a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisherprune.persample.calls import (
    Arguments,
    Function,
    Key,
    Tracking,
    is_transformed,
    without_tensors,
)
from fisherprune.persample.layout import Alone


@dataclass(frozen=True)
class Record:
    """A call with shared tensors.

    Attributes:
        arguments: with an empty tensor in the place of each.
        tensors: what it read, in order; shapes alone of shared tensors.
        output: None where it is no tensor.
    """

    arguments: Arguments
    tensors: list[Alone]
    output: Alone | None


@dataclass
class Records:
    """All calls with shared tensors while one sample ran alone.

    Attributes:
        sample: its number in the batch.
    """

    sample: int = -1
    by_key: dict[Key, Record] = field(default_factory=dict)
    largest: float = 0.0
    """The largest norm of a tensor that they read."""

    def is_same(self, one: Tensor, other: Tensor) -> bool:
        """Return whether a call read the same, up to what another batch size rounds.

        What is nearly zero has the rounding errors of the larger numbers from which it
        was computed.
        """
        if not one.is_floating_point():
            return torch.equal(one, other)
        tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
        one, other = one.float(), other.float()
        size = float(other.detach().norm()) + 1e-3 * self.largest
        return not (one - other).norm() > tolerance * size


class Recorder(Tracking):
    """Records the calls with shared tensors while one sample runs alone.

    Args:
        parameters: the watched ones, by name.
        batch: the tensors of the sample.
        sample: its number in the batch.
        made: calls whose results are known to be of samples, though what they read is
            shared: copies for each sample.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Sequence[Tensor],
        sample: int = -1,
        made: Collection[Key] = (),
    ) -> None:
        super().__init__(parameters, batch)
        self.records, self.made = Records(sample), made

    def run_shared(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> object:
        """Record the call, as it was before it ran."""
        if any(map(is_transformed, tensors)):  # it has no values of its own
            return super().run_other(func, arguments, tensors, shared)
        key = self.key_of(func, shared)
        before = [self._alone(t, id(t) in self.keys) for t in tensors]
        args, kwargs = arguments
        output = func(*args, **kwargs)
        result = tensors[0] if func is Tensor.__setitem__ else output
        after = self._alone(result, False) if isinstance(result, Tensor) else None
        record = Record(without_tensors(arguments), before, after)
        self.records.by_key[key] = record
        if key in self.made:
            self.mark(output)
        elif not any(self.is_marked(t) for t in tensors):
            self.note_computed(output, key, shared)
        return output

    def _alone(self, tensor: Tensor, shared: bool) -> Alone:
        shape = tuple(tensor.shape)
        if shared:
            return Alone(shape)
        value = tensor.detach().clone()
        if value.is_floating_point():
            norm = float(torch.linalg.vector_norm(value.float()))
            self.records.largest = max(self.records.largest, norm)
        return Alone(shape, value)
