"""From what is computed from a parameter back to the parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fisherprune.persample.contributions import (
    Contribution,
    Gradients,
    add_streamed,
)
from fisherprune.persample.joined import joined


@dataclass(frozen=True)
class Pulled:
    """Gradients of a computed tensor, pulled back to a parameter that it comes from."""

    gradients: Contribution
    computed: Tensor
    parameter: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.gradients)

    def samples(self, chosen: slice) -> Pulled:
        """Return those of some of the samples."""
        return replace(self, gradients=self.gradients.samples(chosen))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        add_streamed(self, sum, sum_sq, group_size)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        rows = self.gradients.per_sample()
        rows = rows.view(len(rows), *self.computed.shape).to(self.computed.dtype)
        try:
            return self._pull(rows, batched=True)
        except (RuntimeError, NotImplementedError):  # what vmap can't run
            return torch.stack([self._pull(row, batched=False) for row in rows])

    def _pull(self, rows: Tensor, batched: bool) -> Tensor:
        (pulled,) = torch.autograd.grad(
            self.computed,
            self.parameter,
            rows,
            retain_graph=True,
            is_grads_batched=batched,
            materialize_grads=True,
        )
        return pulled.float()


@dataclass(frozen=True)
class Region:
    """Gradients of a view of a parameter: its moments are a part of the parameter's."""

    gradients: Contribution
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(gradients: Contribution, view: Tensor, parameter: Tensor) -> Region | None:
        """Return the region of a view; None where it is none, or has entries twice."""
        if view._base is not parameter or not parameter.is_contiguous():
            return None
        size, stride = tuple(view.shape), view.stride()
        if (
            view.numel() == 0
            or view.dtype != parameter.dtype
            or any(n > 1 and s == 0 for n, s in zip(size, stride, strict=True))
        ):
            return None
        offset = int(view.storage_offset()) - int(parameter.storage_offset())
        return Region(gradients, size, stride, offset)

    @property
    def span(self) -> tuple[int, int]:
        """Return the first of the parameter's entries that it has, and the last."""
        steps = zip(self.size, self.stride, strict=True)
        return self.offset, self.offset + sum((n - 1) * s for n, s in steps)

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate in the part of the parameter's sums."""
        place = self.size, self.stride, self.offset
        part, part_sq = sum.as_strided(*place), sum_sq.as_strided(*place)
        if part.is_contiguous():
            self.gradients.add_moments(part, part_sq, group_size)
            return
        own, own_sq = (torch.zeros(self.size, device=sum.device) for _ in range(2))
        self.gradients.add_moments(own, own_sq, group_size)
        part += own
        part_sq += own_sq


@dataclass(frozen=True)
class Regions:
    """Gradients of views of a parameter that have no entry in common."""

    regions: tuple[Region, ...]

    def samples(self, chosen: slice) -> Regions:
        """Return those of some of the samples."""
        return Regions(
            tuple(
                replace(each, gradients=each.gradients.samples(chosen))
                for each in self.regions
            )
        )

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate in each view's part of the sums."""
        for each in self.regions:
            each.add_moments(sum, sum_sq, group_size)

    @property
    def are_apart(self) -> bool:
        """Return whether no entry is between the ends of two of them."""
        spans = sorted(each.span for each in self.regions)
        return all(a[1] < b[0] for a, b in pairwise(spans))


def all_of(
    parameter: Tensor,
    direct: Contribution | None,
    computed: Sequence[tuple[Contribution, Tensor]],
) -> Gradients | None:
    """Return all gradients of a parameter; None where there are none.

    Args:
        parameter: the parameter.
        direct: those of its own uses.
        computed: those of tensors that are computed from it, and the tensors.
    """
    if not computed:
        return direct
    if not direct and (regions := _regions(computed, parameter)):
        return regions
    pulled = [Pulled(*each, parameter) for each in computed]
    return joined([direct, *pulled] if direct else pulled)


def _regions(
    computed: Sequence[tuple[Contribution, Tensor]], parameter: Tensor
) -> Regions | None:
    """Return the gradients of views; None where they are others, or overlap."""
    places = defaultdict(list)
    for gradients, view in computed:
        region = Region.of(gradients, view, parameter)
        if region is None:
            return None
        places[region.size, region.stride, region.offset].append(region)
    regions = Regions(
        tuple(
            replace(same[0], gradients=joined([each.gradients for each in same]))
            for same in places.values()
        )
    )
    return regions if regions.are_apart else None
