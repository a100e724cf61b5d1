"""The run of one sample alone: what its calls read, to find samples in a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from fisherprune.persample.arguments import Arguments, without_tensors
from fisherprune.persample.calls import Key, Tracking, is_transformed
from fisherprune.persample.functions import Function, writes
from fisherprune.persample.layout import Alone, Layout
from fisherprune.persample.registry import may_be_layer
from fisherprune.shards import any_shard, is_shard, local

PART = 1 << 10
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
        output: None where it is no tensor; a shape alone where comparisons wait and a
            rule for a kind of layer does not read it.
    """

    arguments: Arguments
    tensors: list[Alone]
    output: Alone | None


@dataclass
class Records:
    """All calls with shared tensors while one sample ran alone.

    Attributes:
        sample: its number in the batch.
        compares_late: whether comparisons wait for ``late_verdicts``: then no device
            waits, all are made at once, and what is of samples is not copied.
        values: of what they read, floating-point tensors.
        is_open: whether something was asked that was not kept, because comparisons
            wait.
    """

    sample: int = -1
    compares_late: bool = False
    by_key: dict[Key, Record] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)
    is_open: bool = False
    _held: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _unlike: list[Tensor] = field(default_factory=list)
    _noted: dict[int, tuple[ReferenceType[Tensor], int]] = field(default_factory=dict)
    _outermost: list[tuple[ReferenceType[Tensor], Tensor]] = field(default_factory=list)

    def held(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor outside of autograd, as they are now.

        That is the tensor itself where comparisons wait: if it is changed in place
        until then, which is rare, it is seen by its version.
        """
        late = self.compares_late and tensor.is_floating_point()
        if not late or tensor.is_inference():
            return _kept(tensor)
        self._held[id(tensor)] = tensor, tensor._version
        return tensor

    def is_held(self, value: Tensor | None) -> bool:
        """Return whether a value is a tensor itself, not a copy."""
        return id(value) in self._held

    def note_outermost(self, tensor: Tensor, layout: Layout, *, is_read: bool) -> None:
        """Keep the first sample and the last in a tensor that gradients come through.

        Of large ones, a part is enough to tell them apart.

        Args:
            tensor: of a call.
            layout: of its samples.
            is_read: by a call that does not change it; others may well do so.
        """
        noted = ref(tensor), tensor._version
        before = self._noted.get(id(tensor))
        if before and before[0]() is tensor and before[1] == noted[1]:
            return  # what one call gave the next reads, or two read it
        self._noted[id(tensor)] = noted
        ends = layout.ends(local(tensor))
        ends = ends.flatten(1) if ends.dim() > 1 else ends.unsqueeze(1)
        if (step := ends.shape[1] // PART) > 0:
            step -= step > 2 and step % 2 == 0  # else the same column of each row
            ends = ends[:, : step * PART : step]
        kept = self.held(ends) if is_read else ends.clone()
        self._outermost.append((noted[0], kept))

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

        Args:
            one: that a call of the sample alone read.
            others: what it may have read in the batch, outside of autograd.
        """
        if not self.compares_late or len(others) > 1:
            return read_at_once([self._differs(one, other) for other in others])
        (other,) = others
        if one.is_floating_point() and one.numel() <= AT_ONCE:
            kept = self.held(other) if self.is_held(one) else _kept(other)
            self._pairs.append((one, kept))
        else:
            self._unlike.append(self._differs(one, other))
        return [False]

    def late_verdicts(self, outputs: Tensor | None) -> tuple[list[Tensor], ...]:
        """Return what was left open, bool tensors of one element.

        Args:
            outputs: of the model; None where they are not known.

        Returns:
            whether calls may have read other values in the batch, for ``read_same``;
            and whether all samples may be the same in tensors other than the outputs:
            where the first differs from the last, they are not.
        """
        unsure, alike = [*self._unlike], list[Tensor]()
        outermost, self._outermost = self._outermost, []
        for ones, others in _sorted(self._pairs):
            sizes = _norms(others)
            room = _tolerance(ones[0]) * (sizes + self._least.to(sizes))
            # Not so where a number is not finite, or stands for infinity.
            same = (_gaps(ones, others) <= room) & (sizes < INFINITE)
            unsure.append(same.all().logical_not())
        inner = defaultdict[object, list[Tensor]](list)
        for tensor, ends in outermost:
            if outputs is None or tensor() is not outputs:
                inner[ends.device, ends.dtype, ends.shape].append(ends)
        for some in inner.values():
            first, last = _wide([torch.stack(some)])[0].unbind(1)
            gaps, sizes = torch.linalg.vector_norm(
                torch.stack([first - last, first]), dim=2
            )
            alike.append((gaps <= 1e-5 * sizes).any())
        return unsure, alike

    def read_same(self, is_unsure: bool) -> bool:
        """Return whether calls read the same in the batch; give up what was held.

        Not where this can't be known, because something was not kept.

        Args:
            is_unsure: by ``late_verdicts``.
        """
        same = all(
            tensor._version == version for tensor, version in self._held.values()
        )
        pairs, self._pairs, self._held = self._pairs, [], {}
        if self.is_open or not same:
            return False
        if not is_unsure:
            return True
        found = [self._differs(one, other) for one, other in pairs]
        return not any(read_at_once([*self._unlike, *found]))

    def closest(self, one: Tensor, others: Sequence[Tensor]) -> tuple[int, bool]:
        """Return which of two others is closest to one, and whether it is by far.

        Not by far where both may be rounding errors of larger numbers; the first one
        where they are about as close.
        """
        one = _kept(one)
        gaps = _gaps([one, one], [_kept(other) for other in others])
        (first, second), rounding = gaps, 1e-2 * self._least.to(gaps.device)
        far = (gaps.max() > 100 * gaps.min()) & (gaps.max() > rounding)
        is_second, is_far = read_at_once([first > 2 * second, far])
        return int(is_second), is_far

    def _differs(self, one: Tensor, other: Tensor) -> Tensor:
        if not one.is_floating_point():
            return (one != other).any()
        one, other = _kept(one), _kept(other)
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
        records: to which the calls are added.
        made: calls whose results are known to be of samples, though what they read is
            shared: copies for each sample.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Sequence[Tensor],
        records: Records,
        made: Collection[Key] = (),
    ) -> None:
        super().__init__(parameters, batch)
        self.records, self.made = records, made

    def run_shared(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        shared: list[Tensor],
    ) -> object:
        """Record the call, as it was before it ran."""
        # What has no values of its own, or has no shape.
        if any(is_transformed(t) or t.is_nested for t in tensors):
            return super().run_other(func, arguments, tensors, shared)
        key = self.key_of(func, shared)
        changes = writes(func.__name__)
        before = [self._alone(t, id(t) in self.keys, changes) for t in tensors]
        args, kwargs = arguments
        output = func(*args, **kwargs)
        if any_shard(tensors):
            from fisherprune.persample.split import added_up

            output = added_up(output)
        result = tensors[0] if func is Tensor.__setitem__ else output
        after = None
        if isinstance(result, Tensor):
            # It may be changed in place, but few ask: one more run is for those.
            later = self.records.compares_late and may_be_layer(func, args, kwargs)
            after = self._alone(result, later, copies=True)
        record = Record(without_tensors(arguments), before, after)
        self.records.by_key[key] = record
        if key in self.made:
            self.mark(output)
        elif not any(self.is_marked(t) for t in tensors) and not any_shard(shared):
            self.note_computed(output, key, shared)
        return output

    def _alone(self, tensor: Tensor, shape_alone: bool, copies: bool) -> Alone:
        part = tensor if shape_alone and not is_shard(tensor) else local(tensor)
        if shape_alone or part.layout != torch.strided:
            return Alone(tuple(part.shape))
        # What is not of samples may be freed without a word, as gathered shards are.
        copies = copies or not self.is_marked(tensor)
        value = _kept(part) if copies else self.records.held(part)
        if value.is_floating_point():
            self.records.values.append(value)
        return Alone(tuple(part.shape), value)
