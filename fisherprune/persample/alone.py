"""The run of one sample alone: what its calls read, to find samples in a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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

PART = 1 << 12
"""Numbers of a sample by which it is told from another one."""
AT_ONCE = 1 << 16
"""Numbers of a tensor up to which it is compared together with others."""
INFINITE = 1e8
"""The least norm of a tensor with numbers that stand for infinity."""


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
        values: of what they read, floating-point tensors.
        compares_late: whether comparisons wait for ``late_verdicts``: then no device
            waits, and all are made at once.
    """

    sample: int = -1
    by_key: dict[Key, Record] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)
    compares_late: bool = False
    _unread: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _unlike: list[Tensor] = field(default_factory=list)
    _outermost: list[tuple[ReferenceType[Tensor], Tensor]] = field(default_factory=list)

    def note_outermost(self, tensor: Tensor, rows: Tensor) -> None:
        """Keep the first sample and the last in a tensor that gradients come through.

        Of large ones, a part is enough to tell them apart.

        Args:
            tensor: of a call.
            rows: of its samples, ``[N, *]``.
        """
        ends = [rows[0].detach(), rows[-1].detach()]
        if (size := ends[0].numel()) > PART:
            ends = [end[:: 1 + size // PART] for end in ends]
        self._outermost.append((ref(tensor), torch.stack(ends)))

    @cached_property
    def _least(self) -> Tensor:
        """What is nearly zero beside the largest of the tensors that were read.

        Nothing is beside those whose numbers stand for infinity, in masks.
        """
        norms = [_norms(some) for (some,) in _sorted((v,) for v in self.values)]
        largest = [each.where(each < INFINITE, 0).max() for each in norms]
        return 1e-3 * torch.stack([each.to(largest[0]) for each in largest]).max()

    def differ(self, one: Tensor, others: Sequence[Tensor]) -> list[bool]:
        """Return which calls read other values, more than another batch size rounds.

        What is nearly zero has the rounding errors of the larger numbers from which it
        was computed. One that nothing is left to choose from may be told later.
        """
        if not self.compares_late or len(others) > 1:
            found = [self._differs(one, other.detach()) for other in others]
            return read_at_once(found)
        other = others[0].detach()
        if one.is_floating_point() and one.numel() <= AT_ONCE:
            self._unread.append((one, _kept(other)))
        else:
            self._unlike.append(self._differs(one, other))
        return [False]

    def late_verdicts(self, outputs: Tensor | None) -> tuple[list[Tensor], ...]:
        """Return what was left open, bool tensors of one element.

        Args:
            outputs: of the model; None where they are not known.

        Returns:
            whether calls read other values in the batch, and whether all samples may be
            the same in tensors other than the outputs: where the first differs from the
            last, they are not.
        """
        differ, alike = self._unlike, list[Tensor]()
        for ones, others in _sorted(self._unread):
            sizes = _norms(others)
            sizes += self._least.to(sizes)
            far = _gaps(ones, others) > _tolerance(ones[0]) * sizes
            differ.append(far.any())
        inner = [
            (both[0], both[1])
            for tensor, both in self._outermost
            if outputs is None or tensor() is not outputs
        ]
        for firsts, lasts in _sorted(inner):
            close = _gaps(firsts, lasts) <= 1e-5 * _norms(firsts)
            alike.append(close.any())
        return differ, alike

    def closest(self, one: Tensor, others: Sequence[Tensor]) -> tuple[int, bool]:
        """Return which of two others is closest to one, and whether it is by far.

        Not by far where both may be rounding errors of larger numbers; the first one
        where they are about as close.
        """
        gaps = _gaps([one, one], [_kept(other.detach()) for other in others])
        (first, second), rounding = gaps, 1e-2 * self._least.to(gaps.device)
        far = (gaps.max() > 100 * gaps.min()) & (gaps.max() > rounding)
        is_second, is_far = read_at_once([first > 2 * second, far])
        return int(is_second), is_far

    def _differs(self, one: Tensor, other: Tensor) -> Tensor:
        if not one.is_floating_point():
            return (one != other).any()
        other = _kept(other)
        gap, size = _gaps([one], [other]), _norms([other])
        return (gap > _tolerance(one) * (size + self._least.to(size))).squeeze()


def _kept(tensor: Tensor) -> Tensor:
    """Return a copy; numbers that stand for infinity can be subtracted in it."""
    if not tensor.is_floating_point():
        return tensor.clone()
    most = min(1e15, torch.finfo(tensor.dtype).max)
    return tensor.clamp(-most, most)


def _tolerance(tensor: Tensor) -> float:
    return 1e-3 if tensor.dtype in (torch.float32, torch.float64) else 5e-2


def _sorted(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield the columns of rows that are on one device and of one dtype."""
    found = defaultdict[object, list[tuple[Tensor, ...]]](list)
    for row in rows:
        found[row[0].device, row[0].dtype].append(row)
    for some in found.values():
        yield [*zip(*some, strict=True)]


def _wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors in which sums of squares of 16-bit numbers have room."""
    wide = torch.float32, torch.float64
    return [tensor if tensor.dtype in wide else tensor.float() for tensor in tensors]


def _gaps(ones: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    """Return the norms of differences."""
    return _norms(torch._foreach_sub(_wide(ones), _wide(others)))


def _norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norms of tensors of one device and dtype, in one tensor."""
    return torch.stack(torch._foreach_norm(_wide(tensors)))


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
        self._last: tuple[Tensor, int, Alone] | None = None

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
        part = local(tensor)
        shape = tuple(part.shape)
        if shared:
            return Alone(shape)
        version = -1 if tensor.is_inference() else tensor._version
        if self._last and self._last[0] is tensor and self._last[1] == version >= 0:
            return self._last[2]  # what a call gave is what the next one reads
        value = _kept(part)
        if value.is_floating_point():
            self.records.values.append(value)
        found = Alone(shape, value)
        self._last = tensor, version, found
        return found
