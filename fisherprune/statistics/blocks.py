"""Sums of many terms: blocks in float32, and their sums in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherprune.statistics.store import BESIDE, Store

BLOCK = 512
"""Terms that float32 tensors sum up at most: rounding then changes 8e-6 of equal ones.

A term of 512 equal ones is rounded by 2^-24 of the sum, alike in each of the last 256.
"""


class BlockSum:
    """Float32 tensors that are added to, a block of terms after the other.

    Blocks are summed up in float64 tensors, 8 bytes an element. These are made when
    the first block is full: what fits into one block takes no memory.

    Args:
        blocks: what terms are added to, after ``make_room``.
        store: where the float64 tensors are kept.
    """

    def __init__(self, blocks: Sequence[Tensor], store: Store = BESIDE) -> None:
        self.blocks, self.store = blocks, store
        self.terms = 0
        self.first: int | None = None  # terms until the blocks were first emptied
        self._totals: list[Tensor] = []

    @property
    def tensors(self) -> list[Tensor]:
        """Return all that is added to."""
        return [*self.blocks, *self._totals]

    @property
    def values(self) -> list[Tensor]:
        """Return the sums as they are."""
        if not self._totals:
            return [*self.blocks]
        return [t + b for t, b in zip(self._totals, self.blocks, strict=True)]

    def twin(self) -> BlockSum:
        """Return one that adds to the same tensors, and counts terms of its own."""
        twin = BlockSum(self.blocks, self.store)
        twin._totals = [*self._totals]
        return twin

    def advance(self, twin: BlockSum) -> None:
        """Make room for the terms that a twin counted, and count them."""
        self.make_room(twin.terms if twin.first is None else twin.first)
        if twin.first is not None:
            self.terms = twin.terms

    def make_room(self, terms: int) -> None:
        """Prepare the blocks for as many more terms, at most ``BLOCK``."""
        if self.terms + terms > BLOCK:
            self._empty_blocks()
        self.terms += terms

    def finish(self) -> None:
        """Set the blocks to the sums of all blocks."""
        if self._totals:
            self._empty_blocks()
            for block, total in zip(self.blocks, self._totals, strict=True):
                block.copy_(total)
            self._totals = []

    def _empty_blocks(self) -> None:
        if not self._totals:
            self._totals = [self.store.copy(b, torch.float64) for b in self.blocks]
        else:
            for block, total in zip(self.blocks, self._totals, strict=True):
                total.add_(block.to(total.device))
        for block in self.blocks:
            block.zero_()
        if self.first is None:
            self.first = self.terms
        self.terms = 0
