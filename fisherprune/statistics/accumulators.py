"""Sums over groups of samples that run on across batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune.persample.contributions import Contribution

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


class Accumulator:
    """Both sums of one parameter, and the sum over a group that is still open."""

    def __init__(self, parameter: Tensor, group_size: int) -> None:
        """Begin with zeros of the parameter's shape, dtype and device, contiguous."""
        self.sum = torch.zeros_like(
            parameter, memory_format=torch.contiguous_format, requires_grad=False
        )
        self.sum_sq = torch.zeros_like(self.sum)
        self.group_size = group_size
        self.open: Tensor | None = None

    def add(self, contribution: Contribution, split: Split) -> None:
        """Add one batch's per-sample gradients."""
        self._add_open(contribution, split.head)
        if split.closes:
            self.close(self.group_size)
        if split.body.stop > split.body.start:
            body = contribution.samples(split.body)
            body.add_moments(self.sum, self.sum_sq, self.group_size)
        self._add_open(contribution, split.tail)

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


class Accumulators:
    """The sums of several parameters over batches; a batch may not use all of them.

    A parameter's accumulator is made when it is first added to: during a backward
    pass, in the place of the activations that it frees.

    Args:
        parameters: by name.
        group_size: samples in a group.
    """

    def __init__(self, parameters: Mapping[str, Tensor], group_size: int) -> None:
        self.parameters, self.group_size = parameters, group_size
        self.samples = 0
        self._used: dict[str, Accumulator] = {}
        self.begin(0)

    @property
    def groups(self) -> int:
        """Number of groups, a partial last one included."""
        return -(-self.samples // self.group_size)

    def begin(self, n: int) -> None:
        """Begin a batch of ``n`` samples."""
        missing = -self.samples % self.group_size
        head = min(missing, n)
        body = head + (n - head) // self.group_size * self.group_size
        parts = slice(0, head), slice(head, body), slice(body, n)
        self._split = Split(*parts, closes=0 < missing == head)
        self._missing = set(self.parameters)
        self.samples += n

    def add(self, name: str, contribution: Contribution) -> None:
        """Add the batch's per-sample gradients of a parameter."""
        self._of(name).add(contribution, self._split)
        self._missing.discard(name)

    def end(self) -> None:
        """End the batch: what was not added has had no gradient in its samples."""
        if self._split.closes:
            for name in self._missing & self._used.keys():
                self._used[name].close(self.group_size)

    def sums(self) -> tuple[Sums, Sums]:
        """Close the last group; return the sums over groups of means and squares."""
        every = {name: self._of(name) for name in self.parameters}
        for each in every.values():
            each.close(self.samples % self.group_size)
        sums = {name: each.sum for name, each in every.items()}
        return sums, {name: each.sum_sq for name, each in every.items()}

    def _of(self, name: str) -> Accumulator:
        if name not in self._used:
            self._used[name] = Accumulator(self.parameters[name], self.group_size)
        return self._used[name]
