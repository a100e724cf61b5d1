"""Sums over groups of samples that run on across batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune.contributions import Contribution


@dataclass(frozen=True)
class Parts:
    """A batch cut where groups end: rest of the open group, whole groups, a rest."""

    head: slice
    body: slice
    tail: slice
    closes: bool  # whether the head fills its group
    group_size: int


class Groups:
    """Counts samples into groups of ``size`` that run on across batches."""

    def __init__(self, size: int):
        self.size = size
        self.samples = 0

    @property
    def open(self) -> int:
        """Samples in the group that is not yet full."""
        return self.samples % self.size

    @property
    def count(self) -> int:
        """Number of groups, a partial last one included."""
        return -(-self.samples // self.size)

    def split(self, n: int) -> Parts:
        """Take the next ``n`` samples."""
        missing = -self.samples % self.size
        head = min(missing, n)
        body = head + (n - head) // self.size * self.size
        self.samples += n
        return Parts(
            slice(0, head),
            slice(head, body),
            slice(body, n),
            closes=0 < missing == head,
            group_size=self.size,
        )


class Moments:
    """Accumulators of one parameter, and the sum over a group that is still open."""

    def __init__(self, sum: Tensor, sum_sq: Tensor):
        self.sum, self.sum_sq = sum, sum_sq
        self.open: Tensor | None = None

    @classmethod
    def like(cls, parameter: Tensor) -> Moments:
        """Return zeros of the parameter's shape, dtype and device, contiguous."""
        sum = torch.zeros_like(
            parameter, memory_format=torch.contiguous_format, requires_grad=False
        )
        return cls(sum, torch.zeros_like(sum))

    def add(self, contribution: Contribution, parts: Parts) -> None:
        """Add one batch's per-sample gradients."""
        self._add_open(contribution, parts.head)
        if parts.closes:
            self.close(parts.group_size)
        if parts.body.stop > parts.body.start:
            body = contribution.samples(parts.body)
            body.add_moments(self.sum, self.sum_sq, parts.group_size)
        self._add_open(contribution, parts.tail)

    def _add_open(self, contribution: Contribution, part: slice) -> None:
        n = part.stop - part.start
        if n == 0:
            return
        mean, ignored = torch.zeros_like(self.sum), torch.zeros_like(self.sum)
        contribution.samples(part).add_moments(mean, ignored, n)
        self.open = mean.mul_(n) if self.open is None else self.open.add_(mean, alpha=n)

    def close(self, size: int) -> None:
        """Square the mean over the open group's ``size`` samples and add it."""
        if self.open is not None:
            mean = self.open.div_(size)
            self.sum += mean
            self.sum_sq += mean.square_()
            self.open = None
