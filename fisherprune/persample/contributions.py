"""What one use of a parameter adds to its per-sample gradients.

``Factors`` (factors.py) are those of weight matrices and kernels, ``Lookups``
(lookups.py) of embeddings, ``Rows`` of small parameters. Each can be multiplied out a
few samples at a time; those with a cheaper exact way to their moments have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fisherprune import ops

if TYPE_CHECKING:
    from typing_extensions import Self

STREAM_BYTES = 32 << 20
"""Bytes of what is multiplied out at a time."""


SMALL = 4096
"""Elements of a parameter whose gradients may be added up with those of others."""


class Gradients(Protocol):
    """The per-sample gradients of one parameter."""

    def samples(self, chosen: slice) -> Self:
        """Return those of some of the samples."""

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate the means of a whole number of groups, and their squares."""


class Contribution(Gradients, Protocol):
    """The part of them that one use of the parameter contributes."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""


class LayerContribution(Contribution, Protocol):
    """What a layer says of one call."""

    def merged(self, k: int) -> Contribution:
        """Make one sample of k consecutive ones, whose gradients add up."""

    def total(self) -> Tensor:
        """Return the sum over the samples, the ordinary gradient."""


@dataclass(frozen=True)
class Rows:
    """The per-sample gradients themselves, ``[N, *shape]``: for small parameters."""

    rows: Tensor

    @staticmethod
    def summed(tensors: Iterable[Tensor]) -> Tensor:
        """Return the sum of tensors of one shape."""
        return reduce(torch.add, tensors)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def samples(self, chosen: slice) -> Rows:
        """Return the rows of some of the samples."""
        return Rows(self.rows[chosen])

    def join(self, others: Sequence[Rows]) -> Rows:
        """Add the gradients of all uses."""
        return Rows(Rows.summed(each.rows for each in (self, *others)))

    def merged(self, k: int) -> Rows:
        """Add up k consecutive rows each."""
        return Rows(self.rows.unflatten(0, (-1, k)).sum(1))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        rows = self.rows.float()
        if rows.is_cpu or sum.numel() <= SMALL:
            own, own_sq = row_moments(rows, group_size)
        else:
            means = rows
            if group_size > 1:
                means = rows.unflatten(0, (-1, group_size)).mean(1)
            own, own_sq = means.sum(0), means.square().sum(0)
        sum += own.reshape(sum.shape)
        sum_sq += own_sq.reshape(sum.shape)

    def per_sample(self) -> Tensor:
        """Return the rows, float32."""
        return self.rows.float()

    def total(self) -> Tensor:
        """Return the sum over the samples, of the parameter's shape."""
        return self.rows.sum(0)


def row_moments(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the sums over groups of the mean of their rows ``[N, *]``, and of squares.

    The bits of an element are the same whatever elements lie beside it.
    """
    if rows.is_cpu:
        return _laid_out(rows, group_size)
    means = rows
    if group_size > 1:
        means = _added(rows.unflatten(0, (-1, group_size)).movedim(1, 0)) / group_size
    return _added(means), _added(means.square())


def _laid_out(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Read rows in the order in which their elements lie in memory."""
    if rows.dim() == 2 and rows.stride(1) == 1:
        return ops.row_moments(rows, group_size)
    order = sorted(range(1, rows.dim()), key=rows.stride, reverse=True)
    laid = rows.permute(0, *order)
    flat = laid.flatten(1) if order else laid.unsqueeze(1)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    back = [order.index(axis) for axis in range(1, rows.dim())]
    own, own_sq = ops.row_moments(flat, group_size)
    shape = laid.shape[1:]
    return own.view(shape).permute(back), own_sq.view(shape).permute(back)


def _added(rows: Tensor) -> Tensor:
    """Return the sum over the first axis, in pairs: ``sum`` adds by the shape."""
    while (half := len(rows) // 2) > 0:
        pairs = rows[:half] + rows[half : 2 * half]
        if len(rows) > 2 * half:
            pairs[0] += rows[-1]
        rows = pairs
    return rows.sum(0)  # of one, or of none


@dataclass(frozen=True)
class Streamed:
    """Per-sample gradients that a function multiplies out, some samples at a time.

    Attributes:
        rows: from a slice of samples to their gradients, ``[n, *shape]``.
        first: the first of the samples.
        count: how many they are.
    """

    rows: Callable[[slice], Tensor]
    first: int
    count: int

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.count

    def samples(self, chosen: slice) -> Streamed:
        """Return the gradients of some of the samples."""
        start, stop, _ = chosen.indices(self.count)
        return Streamed(self.rows, self.first + start, max(0, stop - start))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        add_streamed(self, sum, sum_sq, group_size)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        return self.rows(slice(self.first, self.first + self.count)).float()


@dataclass(frozen=True)
class Mixed:
    """Contributions of several kinds, added up where they are multiplied out."""

    parts: tuple[Contribution, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.parts[0])

    def samples(self, chosen: slice) -> Mixed:
        """Return the gradients of some of the samples."""
        return Mixed(tuple(part.samples(chosen) for part in self.parts))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        add_streamed(self, sum, sum_sq, group_size)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        return Rows.summed(part.per_sample() for part in self.parts)


@dataclass(frozen=True)
class PartOf:
    """Per-sample gradients of a whole parameter, of which a rank keeps its part.

    Attributes:
        gradients: of the whole.
        shape: of the whole.
        place: of the part.
    """

    gradients: Any
    shape: tuple[int, ...]
    place: tuple[slice, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.gradients)

    def samples(self, chosen: slice) -> PartOf:
        """Return those of some of the samples."""
        return replace(self, gradients=self.gradients.samples(chosen))

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]`` of the part, float32."""
        rows: Tensor = self.gradients.per_sample().view(-1, *self.shape)
        place = (slice(None), *self.place)
        return rows[place]

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate in whole tensors, as one process does, which last this call."""
        if not sum.numel():
            return
        means, squares = sum.new_zeros(self.shape), sum.new_zeros(self.shape)
        means[self.place], squares[self.place] = sum, sum_sq
        self.gradients.add_moments(means, squares, group_size)
        sum.copy_(means[self.place])
        sum_sq.copy_(squares[self.place])


def add_streamed(
    gradients: Contribution, sum: Tensor, sum_sq: Tensor, group_size: int
) -> None:
    """Accumulate moments of what is multiplied out a few samples at a time."""
    at_once = max(1, STREAM_BYTES // max(1, 4 * sum.numel()))
    if at_once >= group_size:
        for part in _parts(len(gradients), at_once // group_size * group_size):
            rows = Rows(gradients.samples(part).per_sample())
            rows.add_moments(sum, sum_sq, group_size)
        return
    for group in _parts(len(gradients), group_size):
        one, mean = gradients.samples(group), torch.zeros_like(sum)
        for part in _parts(group_size, at_once):
            mean += one.samples(part).per_sample().sum(0).view(sum.shape)
        mean /= group_size
        sum += mean
        sum_sq += mean.square_()


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def summed_positions(grad: Tensor) -> Rows:
    """Per-sample bias gradients of a channels-second layer: ``[N, C, *] -> [N, C]``."""
    return Rows(grad.float().flatten(2).sum(-1) if grad.dim() > 2 else grad.float())
