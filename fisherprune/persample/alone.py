"""The run of one sample alone: what its calls read, to find samples in a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import ReferenceType, ref

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
from fisherprune.shards import any_shard, local


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
        norms: of the tensors that they read.
        compares_late: whether comparisons stay ``unread``: then no device waits.
        unread: for each of them whether a call read other values in the batch, bool.
        alike: tensors that gradients come through, with whether the first sample and
            the last are the same in them, bool.
    """

    sample: int = -1
    by_key: dict[Key, Record] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    compares_late: bool = False
    unread: list[Tensor] = field(default_factory=list)
    alike: list[tuple[ReferenceType[Tensor], Tensor]] = field(default_factory=list)

    def note_alike(self, tensor: Tensor, rows: Tensor) -> None:
        """Note whether all samples may be the same in a tensor, but for rounding.

        Where the outermost two differ, not all are the same.

        Args:
            tensor: of a call.
            rows: of its samples, ``[N, *]``.
        """
        first, last = rows[0].detach().float(), rows[-1].detach().float()
        is_alike = (first - last).norm() <= 1e-5 * first.norm()
        self.alike.append((ref(tensor), is_alike))

    @cached_property
    def _least(self) -> Tensor:
        """What is nearly zero beside the largest of the tensors that were read."""
        device = self.norms[0].device
        return 1e-3 * torch.stack([norm.to(device) for norm in self.norms]).max()

    def differ(self, one: Tensor, others: Sequence[Tensor]) -> list[bool]:
        """Return which calls read other values, more than another batch size rounds.

        What is nearly zero has the rounding errors of the larger numbers from which it
        was computed. One that nothing is left to choose from may be told later.
        """
        found = [self._differs(one, other.detach()) for other in others]
        if self.compares_late and len(found) == 1:
            self.unread += found
            return [False]
        return read_at_once(found)

    def closest(self, one: Tensor, others: Sequence[Tensor]) -> tuple[int, bool]:
        """Return which of two others is closest to one, and whether it is by far.

        Not by far where both may be rounding errors of larger numbers; the first one
        where they are about as close.
        """
        gaps = torch.stack([(one - o.detach()).float().norm() for o in others])
        (first, second), rounding = gaps, 1e-2 * self._least.to(gaps.device)
        far = (gaps.max() > 100 * gaps.min()) & (gaps.max() > rounding)
        is_second, is_far = read_at_once([first > 2 * second, far])
        return int(is_second), is_far

    def _differs(self, one: Tensor, other: Tensor) -> Tensor:
        if not one.is_floating_point():
            return (one != other).any()
        tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
        one, other = one.float(), other.float()
        size = other.norm() + self._least.to(other.device)
        return (one - other).norm() > tolerance * size


def read_at_once(flags: Sequence[Tensor]) -> list[bool]:
    """Return the values of bool tensors of one element, with one wait for a device."""
    device = flags[0].device
    return torch.stack([flag.detach().to(device) for flag in flags]).tolist()


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
        if any_shard(tensors):
            from fisherprune.persample.split import added_up

            output = added_up(output)
        result = tensors[0] if func is Tensor.__setitem__ else output
        after = self._alone(result, False) if isinstance(result, Tensor) else None
        record = Record(without_tensors(arguments), before, after)
        self.records.by_key[key] = record
        if key in self.made:
            self.mark(output)
        elif not any(self.is_marked(t) for t in tensors) and not any_shard(shared):
            self.note_computed(output, key, shared)
        return output

    def _alone(self, tensor: Tensor, shared: bool) -> Alone:
        tensor = local(tensor)
        shape = tuple(tensor.shape)
        if shared:
            return Alone(shape)
        value = tensor.clone()
        if value.is_floating_point():
            self.records.norms.append(torch.linalg.vector_norm(value.float()))
        return Alone(shape, value)
