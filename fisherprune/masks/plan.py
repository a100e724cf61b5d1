"""shim"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherprune.masks.counts import Densities, Shapes, kept_counts
from fisherprune.masks.select import select_counted


@dataclass(frozen=True)
class Plan:
    shapes: Shapes
    scope: str = "global"
    densities: Densities | None = None

    def check(self, sparsities):
        for s in sparsities:
            kept_counts(self.shapes, s, self.scope, densities=self.densities)

    def select(self, scores, sparsities, ties="error", among=None):
        counts = [
            kept_counts(self.shapes, s, self.scope, densities=self.densities)
            for s in sparsities
        ]
        if among is not None:
            scores = {
                n: torch.where(among[n], s, torch.finfo(s.dtype).min)
                for n, s in scores.items()
            }
        return select_counted(scores, counts, ties)
