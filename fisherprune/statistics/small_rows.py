"""Gradients of small parameters, of which networks have hundreds, added up together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherprune.persample.contributions import SMALL, Gradients, Rows, row_moments
from fisherprune.statistics.blocks import BLOCK

if TYPE_CHECKING:
    from typing import TypeGuard

    from fisherprune.statistics.accumulators import Accumulator


class SmallRows:
    """Per-sample gradients that wait for the end of a batch: a few calls add all.

    Args:
        group_size: samples in a group.
        samples: of the batch; 0 where it has not whole groups alone.
    """

    def __init__(self, group_size: int, samples: int) -> None:
        self.group_size, self.samples = group_size, samples
        self._taken: list[tuple[Accumulator, Tensor]] = []

    def takes(self, gradients: Gradients) -> TypeGuard[Rows]:
        """Return whether gradients may wait for others."""
        return (
            isinstance(gradients, Rows)
            and self.group_size <= BLOCK
            and 0 < self.samples <= BLOCK * self.group_size
            and gradients.rows.numel() <= SMALL * self.samples
        )

    def add(self, to: Accumulator, gradients: Rows) -> None:
        """Add gradients, which must not change until ``add_all``."""
        self._taken.append((to, gradients.rows))

    def add_all(self) -> None:
        """Add all to their accumulators."""
        by_device: dict[torch.device, list[tuple[Accumulator, Tensor]]] = {}
        for to, rows in self._taken:
            by_device.setdefault(rows.device, []).append((to, rows))
        self._taken.clear()
        for taken in by_device.values():
            self._add_all(*zip(*taken, strict=True))

    def _add_all(self, to: Sequence[Accumulator], rows: Sequence[Tensor]) -> None:
        flat = [
            each if each.dim() == 2 else each.reshape(self.samples, -1) for each in rows
        ]
        if any(each.dtype != torch.float32 for each in flat):
            flat = [each.float() for each in flat]
        sizes = [each.shape[1] for each in flat]
        sums, squares = row_moments(torch.cat(flat, 1), self.group_size)
        for each in to:
            each.make_room(self.samples // self.group_size)
        _add_parts([each.sum for each in to], sums.split(sizes))
        _add_parts([each.sum_sq for each in to], squares.split(sizes))


def _add_parts(sums: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    shaped = [
        p if s.dim() == 1 else p.view(s.shape) for p, s in zip(parts, sums, strict=True)
    ]
    torch._foreach_add_(list(sums), shaped)
