"""Sums over groups of samples that run on across batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune.persample.contributions import Gradients
from fisherprune.statistics.blocks import BLOCK, BlockSum
from fisherprune.statistics.small_rows import SmallRows
from fisherprune.statistics.store import BESIDE, Store

Sums = dict[str, Tensor]
"""By parameter name."""


@dataclass(frozen=True)
class Split:
    """A batch cut where groups end: rest of the open group, whole groups, a rest."""

    head: slice
    body: slice
    tail: slice
    closes: bool
    """Whether the head fills its group."""
    groups: int
    """Of a batch of whole groups alone, which one block holds; else 0."""

    def of(self, gradients: Gradients, part: slice) -> Gradients:
        """Return the gradients of a part of the batch: themselves for the whole."""
        whole = slice(0, self.tail.stop)
        return gradients if part == whole else gradients.samples(part)


class Accumulator:
    """Both sums of one parameter, and the sum over a group that is still open.

    What is kept elsewhere is copied beside the parameter while it is added to: sums are
    the same bits wherever they are kept.
    """

    def __init__(
        self, parameter: Tensor, group_size: int, store: Store = BESIDE
    ) -> None:
        """Begin with zeros of the parameter's shape, float32."""
        self.device, self.store = parameter.device, store
        self.sum, self.sum_sq = (store.zeros(parameter) for _ in range(2))
        self._sums = BlockSum([self.sum, self.sum_sq], store)
        self.group_size = group_size
        self.open: Tensor | None = None
        self._room: Tensor | None = None

    def add(self, gradients: Gradients, split: Split) -> None:
        """Add one batch's per-sample gradients."""
        if self.is_beside:
            self._add(gradients, split)
        else:
            with self._beside():
                self._add(gradients, split)

    def make_room(self, groups: int) -> None:
        """Prepare both sums for so many whole groups, at most ``BLOCK``."""
        self._sums.make_room(groups)

    def close(self, size: int) -> None:
        """Square the mean over the open group's ``size`` samples and add it.

        Samples of the group that were not added have had no gradient.
        """
        if self.open is not None:
            with self._beside():
                self._close(size)

    def finish(self, last_size: int) -> None:
        """Close the last group; then ``sum`` and ``sum_sq`` are those of all groups."""
        self.close(last_size)
        self._sums.finish()

    @property
    def tensors(self) -> list[Tensor]:
        """Return all that is added to, but for an open group."""
        return self._sums.tensors

    @property
    def values(self) -> list[Tensor]:
        """Return the sums of all groups that are closed, of means and of squares."""
        return self._sums.values

    def twin(self) -> Accumulator:
        """Return one that adds to the same tensors, and counts groups of its own."""
        twin = copy(self)
        twin._sums = self._sums.twin()
        return twin

    def advance(self, twin: Accumulator) -> None:
        """Count what was added as a twin has counted it."""
        self._sums.advance(twin._sums)

    @property
    def is_beside(self) -> bool:
        """Return whether sums are on the parameter's device."""
        return self.store.holds(self.device)

    def _add(self, gradients: Gradients, split: Split) -> None:
        if split.groups:
            self._sums.make_room(split.groups)
            gradients.add_moments(self.sum, self.sum_sq, self.group_size)
            return
        self._add_open(gradients, split.head)
        if split.closes:
            self._close(self.group_size)
        if self.group_size > BLOCK:
            self._add_large_groups(gradients, split.body)
        else:
            self._add_groups(gradients, split)
        self._add_open(gradients, split.tail)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Have what is kept elsewhere beside the parameter, and bring it back."""
        if self.is_beside:
            yield
            return
        kept = self.sum, self.sum_sq
        self.sum, self.sum_sq = (t.to(self.device, copy=True) for t in kept)
        self._sums.blocks = self.sum, self.sum_sq
        if self.open is not None:
            self.open = self.open.to(self.device, copy=True)
        yield
        for there, here in zip(kept, self._sums.blocks, strict=True):
            there.copy_(here)
        self.sum, self.sum_sq = self._sums.blocks = kept
        if self.open is not None:
            if self._room is None:
                self._room = self.store.zeros(self.open, self.open.dtype)
            self.open = self._room.copy_(self.open)

    def _add_groups(self, gradients: Gradients, split: Split) -> None:
        for part in _parts(split.body, BLOCK * self.group_size):
            self._sums.make_room((part.stop - part.start) // self.group_size)
            some = split.of(gradients, part)
            some.add_moments(self.sum, self.sum_sq, self.group_size)

    def _add_large_groups(self, gradients: Gradients, whole: slice) -> None:
        for group in _parts(whole, self.group_size):
            self._add_open(gradients, group)
            self._close(self.group_size)

    def _add_open(self, gradients: Gradients, samples: slice) -> None:
        if samples.start == samples.stop:
            return
        for part in _parts(samples, BLOCK):
            n = part.stop - part.start
            mean, ignored = torch.zeros_like(self.sum), torch.zeros_like(self.sum)
            gradients.samples(part).add_moments(mean, ignored, n)
            if self.open is None:
                large = self.group_size > BLOCK
                self.open = (mean.double() if large else mean).mul_(n)
            else:
                self.open.add_(mean, alpha=n)

    def _close(self, size: int) -> None:
        if self.open is not None:
            mean = self.open.div_(size)
            self._sums.make_room(1)
            self.sum += mean
            self.sum_sq += mean.square_()
            self.open = None


def _parts(whole: slice, size: int) -> list[slice]:
    """Cut a slice into slices of that size, the last one of what is left."""
    starts = range(whole.start, whole.stop, size)
    return [slice(start, min(start + size, whole.stop)) for start in starts]


def bytes_a_weight(group_size: int) -> int:
    """Return the most bytes that an accumulator takes for each weight."""
    blocks, totals = 2 * 4, 2 * 8
    open = 0 if group_size == 1 else 4 if group_size <= BLOCK else 8
    return blocks + totals + open


class Accumulators:
    """The sums of several parameters over batches; a batch may not use all of them.

    A parameter's accumulator is made when it is first added to: during a backward
    pass, in the place of the activations that it frees. It takes 8 bytes a weight, and
    24 once more than ``BLOCK`` groups have been added, see ``bytes_a_weight``.

    Args:
        parameters: by name.
        group_size: samples in a group.
        only: names of those that are summed up; None: all.
        store: where sums are kept.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        group_size: int,
        only: Collection[str] | None = None,
        store: Store = BESIDE,
    ) -> None:
        self.parameters, self.group_size = dict(parameters), group_size
        self.only, self.store = only, store
        self.samples = 0
        self._used: dict[str, Accumulator] = {}
        self.begin(0)

    @property
    def groups(self) -> int:
        """Number of groups, a partial last one included."""
        return -(-self.samples // self.group_size)

    def wants(self, name: str) -> bool:
        """Return whether a parameter is summed up."""
        return self.only is None or name in self.only

    def begin(self, n: int) -> None:
        """Begin a batch of ``n`` samples."""
        missing = -self.samples % self.group_size
        head = min(missing, n)
        body = head + (n - head) // self.group_size * self.group_size
        parts = slice(0, head), slice(head, body), slice(body, n)
        groups = n // self.group_size if body - head == n else 0
        fits = self.group_size <= BLOCK and groups <= BLOCK
        closes = 0 < missing == head
        self._split = Split(*parts, closes=closes, groups=groups if fits else 0)
        self._rows = SmallRows(self.group_size, n if groups else 0)
        self._missing = set(self.parameters)
        self.samples += n

    def add(self, name: str, gradients: Gradients) -> None:
        """Add the batch's per-sample gradients of a parameter that is summed up."""
        if self.wants(name):
            of = self._of(name)
            if of.is_beside and self._rows.takes(gradients):
                self._rows.add(of, gradients)
            else:
                of.add(gradients, self._split)
            self._missing.discard(name)

    def end(self) -> None:
        """End the batch: what was not added has had no gradient in its samples."""
        self._rows.add_all()
        if self._split.closes:
            for name in self._missing & self._used.keys():
                self._used[name].close(self.group_size)

    def sums(self) -> tuple[Sums, Sums]:
        """Close the last group; return the sums over groups of means and squares."""
        every = {name: self._of(name) for name in self.parameters if self.wants(name)}
        for each in every.values():
            each.finish(self.samples % self.group_size)
        sums = {name: each.sum for name, each in every.items()}
        return sums, {name: each.sum_sq for name, each in every.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """Return all that is added to, but for open groups."""
        return [tensor for each in self._used.values() for tensor in each.tensors]

    @property
    def values(self) -> dict[str, list[Tensor]]:
        """Return the sums so far of parameters that were added to."""
        return {name: each.values for name, each in self._used.items()}

    def fresh(self) -> Accumulators:
        """Return accumulators of the same parameters, with nothing in them."""
        return Accumulators(self.parameters, self.group_size, self.only, self.store)

    def twin(self) -> Accumulators:
        """Return one that adds to the same tensors, and counts samples of its own."""
        twin = self.fresh()
        twin._used = {name: each.twin() for name, each in self._used.items()}
        return twin

    def advance(self, twin: Accumulators) -> None:
        """Count samples that are added without ``add``, as a twin has counted them."""
        self.samples += twin.samples
        for name in self._used.keys() & twin._used.keys():
            self._used[name].advance(twin._used[name])

    def forget(self) -> None:
        """Give the memory of all sums back."""
        self._used.clear()

    def hand_over(self, name: str, other: Accumulators) -> None:
        """Let ``other``, which saw as many samples, go on with a parameter."""
        other.parameters[name] = self.parameters.pop(name)
        if name in self._used:
            other._used[name] = self._used.pop(name)

    def _of(self, name: str) -> Accumulator:
        if name not in self._used:
            parameter = self.parameters[name]
            self._used[name] = Accumulator(parameter, self.group_size, self.store)
        return self._used[name]


class Forgetful(Accumulators):
    """Computes the moments of a batch of whole groups, and forgets them."""

    def add(self, name: str, gradients: Gradients) -> None:
        """Compute the moments of one parameter."""
        if self.wants(name):
            one = Accumulator(self.parameters[name], self.group_size)
            one.add(gradients, self._split)
