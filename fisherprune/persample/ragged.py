"""Rows that belong to samples in uneven numbers: experts, packed sequences, nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.factors import Factors


@dataclass(frozen=True)
class RaggedFactors:
    r"""A weight matrix's per-sample gradients, of as many rows as each sample has.

    .. math:: G_n = \sum_{r \in rows(n)} grad_r \, input_r^T

    Attributes:
        input: ``[R, in]``, the rows of a sample together, samples in order.
        grad: ``[R, out]``.
        starts: ``[N + 1]``, the first row of each sample and the end, on the CPU.
        shape: the weight's, ``(out, in)``.
    """

    input: Tensor
    grad: Tensor
    starts: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def of(factors: Factors, samples: Tensor, count: int) -> RaggedFactors:
        """Return those of rows of any samples.

        Args:
            factors: ``[R, *, in]`` and ``[R, *, out]``.
            samples: ``[R]``, whose they are.
            count: N.
        """
        order = samples.argsort(stable=True)
        input, grad = (t[order] for t in (factors.input, factors.grad))
        each = input.shape[1:-1].numel()
        counts = torch.bincount(samples, minlength=count) * each
        starts = F.pad(counts.cumsum(0), (1, 0)).cpu()
        flat = input.flatten(0, -2), grad.flatten(0, -2)
        return RaggedFactors(*flat, starts, factors.shape)

    @staticmethod
    def of_whole(factors: Factors) -> RaggedFactors:
        """Return the same of factors ``[N, *, in]`` and ``[N, *, out]``."""
        numbers = torch.arange(len(factors), device=factors.grad.device)
        return RaggedFactors.of(factors, numbers, len(factors))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.starts) - 1

    def samples(self, chosen: slice) -> RaggedFactors:
        """Return the factors of some of the samples."""
        start, stop, _ = chosen.indices(len(self))
        starts = self.starts[start : max(start, stop) + 1]
        rows = slice(int(starts[0]), int(starts[-1]))
        input, grad = self.input[rows], self.grad[rows]
        return RaggedFactors(input, grad, starts - starts[0], self.shape)

    def balanced(self) -> RaggedFactors:
        """Return the same gradients, as ``Factors.balanced`` does."""
        if not self.grad.numel():
            return self
        same = Factors(self.input, self.grad, self.shape).balanced()
        return replace(self, input=same.input, grad=same.grad)

    def join(self, others: Sequence[RaggedFactors]) -> RaggedFactors:
        """Join the rows of all uses."""
        uses = (self, *others)
        rows = Factors(
            torch.cat([use.input for use in uses]),
            torch.cat([use.grad for use in uses]),
            self.shape,
        )
        samples = torch.cat([use._samples_of_rows() for use in uses])
        return RaggedFactors.of(rows, samples.to(self.grad.device), len(self))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples.

        Groups of about as many rows are taken together, padded with zeros to the next
        power of two.
        """
        starts = self.starts[::group_size]
        counts = starts.diff()
        sizes = 2 ** torch.log2(counts.double()).ceil().long()  # of none: not above 0
        for size in sizes[counts > 0].unique().tolist():
            chosen = (counts > 0) & (sizes == size)
            factors = self._padded(starts[:-1][chosen], counts[chosen])
            if group_size > 1:
                factors = replace(factors, grad=factors.grad / group_size)
            factors.add_moments(sum, sum_sq, 1)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        ends = self.starts.tolist()
        rows = zip(ends, ends[1:], strict=False)
        each = ((self.grad[a:b].float(), self.input[a:b].float()) for a, b in rows)
        return torch.stack([grad.T @ input for grad, input in each])

    def _samples_of_rows(self) -> Tensor:
        return torch.arange(len(self)).repeat_interleave(self.starts.diff())

    def _padded(self, first: Tensor, counts: Tensor) -> Factors:
        """Return the rows that begin at ``first``, ``[N, T, features]`` with zeros."""
        most = int(counts.max())
        place = torch.arange(most)
        missing = (place >= counts[:, None]).to(self.grad.device)
        rows = first[:, None] + place
        rows = rows.clamp_max(len(self.grad) - 1).to(self.grad.device)
        input, grad = (
            t[rows].masked_fill(missing.unsqueeze(-1), 0)
            for t in (self.input, self.grad)
        )
        return Factors(input, grad, self.shape)


@dataclass(frozen=True)
class Experts:
    """Those of each matrix of a weight ``[E, in, out]``, which has rows of its own."""

    parts: tuple[RaggedFactors, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.parts[0])

    def samples(self, chosen: slice) -> Experts:
        """Return the factors of some of the samples."""
        return Experts(tuple(part.samples(chosen) for part in self.parts))

    def balanced(self) -> Experts:
        """Return the same gradients, as ``Factors.balanced`` does."""
        return Experts(tuple(part.balanced() for part in self.parts))

    def join(self, others: Sequence[Experts]) -> Experts:
        """Join the rows of all uses."""
        uses = zip(self.parts, *(each.parts for each in others), strict=True)
        return Experts(tuple(first.join(rest) for first, *rest in uses))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        for part, own, own_sq in zip(self.parts, sum, sum_sq, strict=True):
            part.add_moments(own, own_sq, group_size)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        return torch.stack([part.per_sample() for part in self.parts], 1)
