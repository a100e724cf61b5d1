"""Per-sample gradients of embeddings: of the rows that a sample looked up alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherprune.persample.factors import Factors


@dataclass(frozen=True)
class Lookups:
    """Rows of a weight ``[V, *]`` that samples looked up, and their gradients.

    Work and memory are those of the rows seen, never ``[N, V, D]``.

    Attributes:
        sample: ``[R]``, whose lookup it is, integers in ``[0, N)``.
        indices: ``[R]``, integers; those outside of ``[0, V)`` have no gradient.
        grad: ``[R, D]``, with D the size of a row.
        shape: the weight's.
        count: N.
    """

    sample: Tensor
    indices: Tensor
    grad: Tensor
    shape: tuple[int, ...]
    count: int

    @staticmethod
    def by_samples(indices: Tensor, grad: Tensor, shape: tuple[int, ...]) -> Lookups:
        """Return those of ``[N, T]`` indices, and gradients ``[N, T, D]``."""
        count, each = indices.shape
        sample = torch.arange(count, device=grad.device).repeat_interleave(each)
        return Lookups(sample, indices.flatten(), grad.flatten(0, 1), shape, count)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.count

    def samples(self, chosen: slice) -> Lookups:
        """Return the lookups of some of the samples."""
        start, stop, _ = chosen.indices(self.count)
        own = (self.sample >= start) & (self.sample < stop)
        count = max(0, stop - start)
        return replace(self, sample=self.sample - start, count=count)._where(own)

    def merged(self, k: int) -> Lookups:
        """Make one sample of k consecutive ones."""
        return replace(self, sample=self.sample // k, count=self.count // k)

    def of_rows(self, samples: Tensor, count: int) -> Lookups:
        """Return the lookups of samples, where those here are of their rows."""
        return replace(self, sample=samples[self.sample], count=count)

    def join(self, others: Sequence[Lookups]) -> Lookups:
        """Join the lookups of all uses."""
        uses = (self, *others)
        return replace(
            self,
            sample=torch.cat([use.sample for use in uses]),
            indices=torch.cat([use.indices for use in uses]),
            grad=torch.cat([use.grad for use in uses]),
        )

    def _where(self, chosen: Tensor) -> Lookups:
        sample, indices = self.sample[chosen], self.indices[chosen]
        return replace(self, sample=sample, indices=indices, grad=self.grad[chosen])

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        _, rows, means = self.means(group_size)
        add_rows(sum, rows, means)
        add_rows(sum_sq, rows, means.square())

    def means(self, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return groups and rows that they looked up, ``[U]``, and means ``[U, D]``."""
        rows = self.shape[0]
        seen = self._where((self.indices >= 0) & (self.indices < rows))
        keys = seen.sample // group_size * rows + seen.indices
        keys, means = _segments(keys, seen.grad.float() / group_size)
        return keys // rows, keys % rows, means

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        samples, rows, grads = self.means(1)
        out = grads.new_zeros(self.count, self.shape[0], grads.shape[1])
        out[samples, rows] = grads
        return out.view(self.count, *self.shape)

    def total(self) -> Tensor:
        """Return the sum over the samples, of the weight's shape."""
        sum = self.grad.new_zeros(self.shape, dtype=torch.float32)
        add_rows(sum, *self.means(1)[1:])
        return sum


@dataclass(frozen=True)
class TiedHead:
    r"""A weight that is an embedding and a linear layer, as in language models.

    With E of the embedding and H of the linear layer, the square of a group's gradient
    is :math:`H^2 + E (E + 2 H)`, whose second part is zero but in the rows looked up.
    """

    lookups: Lookups
    head: Factors

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lookups)

    def samples(self, chosen: slice) -> TiedHead:
        """Return the gradients of some of the samples."""
        return TiedHead(self.lookups.samples(chosen), self.head.samples(chosen))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        self.head.add_moments(sum, sum_sq, group_size)
        groups, rows, means = self.lookups.means(group_size)
        heads = torch.cat(
            [
                self._head_rows(slice(start, start + group_size), some)
                for start, some in zip(
                    range(0, len(self), group_size),
                    rows.split(_counts(groups, len(self) // group_size)),
                    strict=True,
                )
            ]
        )
        add_rows(sum, rows, means)
        add_rows(sum_sq, rows, means * (means + 2 * heads))

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, V, D]``, float32."""
        return self.lookups.per_sample() + self.head.per_sample()

    def _head_rows(self, group: slice, rows: Tensor) -> Tensor:
        """Return some rows of the linear layer's mean gradient of one group."""
        some = self.head.samples(group)
        grad, input = (t.flatten(0, -2) for t in (some.grad, some.input))
        return grad[:, rows].float().T @ input.float() / len(some)


def _counts(groups: Tensor, count: int) -> list[int]:
    return torch.bincount(groups, minlength=count).tolist()


def _segments(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different keys in order, and the sums of each one's values.

    The same bits each time, on a GPU too: autograd's own sum for embeddings sorts.
    """
    different, inverse = keys.unique(return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(
        values, inverse, len(different), -1, False
    )
    return different, sums


def add_rows(sum: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values ``[U, D]`` to rows of a sum; a row may come several times."""
    different, sums = _segments(rows, values)
    sum[different] += sums.view(-1, *sum.shape[1:])
