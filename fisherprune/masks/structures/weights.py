"""Structure "weights": each weight is kept or pruned by itself."""

from __future__ import annotations

from fisherprune.masks.largest import Contest, keep_largest
from fisherprune.masks.structures.registry import (
    Selection,
    Structure,
    Tensors,
    register_structure,
)


@register_structure("weights", "each weight by itself")
class Weights(Structure):
    """No structure: exactly as many weights are kept as are asked for."""

    exact = True

    def select(self, selection: Selection) -> list[Tensors]:
        """Keep the largest scores."""
        contest = Contest.of(selection.scores, selection.among, selection.room)
        return keep_largest(contest, selection.counts, selection.least, selection.ties)
