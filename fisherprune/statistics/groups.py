"""Sums over groups of samples that run on across batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune.persample.contributions import Contribution


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
        """Square the mean over the open group's ``size`` samples and add it.

        Samples of the group that were not added have had no gradient.
        """
        if self.open is not None:
            mean = self.open.div_(size)
            self.sum += mean
            self.sum_sq += mean.square_()
            self.open = None


class BatchedMoments:
    """Moments of several parameters over batches; each may miss in some of them.

    A parameter's accumulators are made when it is first added to: during a backward
    pass, in the place of the activations that it frees.

    Args:
        parameters: by name.
        group_size: samples in a group.
    """

    def __init__(self, parameters: Mapping[str, Tensor], group_size: int):
        self.groups = Groups(group_size)
        self.parameters = parameters
        self.moments: dict[str, Moments] = {}  # of those that were added to
        self._parts: Parts | None = None
        self._missing: set[str] = set()

    def begin(self, n: int) -> None:
        """Begin a batch of ``n`` samples."""
        self._parts, self._missing = self.groups.split(n), set(self.parameters)

    def add(self, name: str, contribution: Contribution) -> None:
        """Add the batch's per-sample gradients of a parameter."""
        self._moments_of(name).add(contribution, self._parts)
        self._missing.discard(name)

    def end(self) -> None:
        """End the batch: what was not added has had no gradient in its samples."""
        if self._parts.closes:
            for name in self._missing & self.moments.keys():
                self.moments[name].close(self.groups.size)

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Close the last group; return the means of the gradients and their squares."""
        found = {name: self._moments_of(name) for name in self.parameters}
        for moment in found.values():
            moment.close(self.groups.open)
        count = self.groups.count
        mean = {name: m.sum.div_(count) for name, m in found.items()}
        return mean, {name: m.sum_sq.div_(count) for name, m in found.items()}

    def _moments_of(self, name: str) -> Moments:
        if name not in self.moments:
            self.moments[name] = Moments.like(self.parameters[name])
        return self.moments[name]
