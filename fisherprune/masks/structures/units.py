"""Structures of units: sets of weights that are kept or pruned together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherprune.masks.counts import Counts
from fisherprune.masks.devices import check_finite
from fisherprune.masks.largest import Contest, keep_largest
from fisherprune.masks.structures.layout import as_cube, cube, from_cube
from fisherprune.masks.structures.registry import Selection, Structure, Tensors


class Units(Structure):
    """Units compete by the mean score of their weights, as many as fit into the counts.

    The mean is the score that a unit brings for each weight that it costs: where a
    number of weights is to be kept, units in that order have the largest sum of scores
    for their number of weights. Sums are made in float64. Units are taken from the best
    one on while their weights together are at most the count, so up to one unit less
    one weight is not used.

    At least one unit is kept, of each layer where layers do not depend on each other,
    though it may be larger than the count.
    """

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` [out, in, taps] in each unit."""
        raise NotImplementedError

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Give each weight of [out, in, taps] what its unit has."""
        raise NotImplementedError

    def select(self, selection: Selection) -> list[Tensors]:
        """Keep the best units."""
        check_finite(selection.scores)
        found = {
            name: self._of(selection, name, score)
            for name, score in selection.scores.items()
        }
        order = {name: _Ranked.of(*one) for name, one in found.items()}
        contest = Contest.of(
            {name: means for name, (means, _) in found.items()},
            {name: sizes > 0 for name, (_, sizes) in found.items()},
            {name: len(ranked.sizes) for name, ranked in order.items()},
        )
        masks = []
        for counts in selection.counts:
            first = {n: order[n].reach(least) for n, least in selection.least.items()}
            units = _units_for(counts, order, first, selection.apart)
            (kept,) = keep_largest(contest, [units], first, selection.ties)
            masks.append(
                {n: self._weights_of(selection, n, mask) for n, mask in kept.items()}
            )
        return masks

    def _of(
        self, selection: Selection, name: str, score: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean score of each unit of a layer, and its number of weights."""
        transposed = name in selection.transposed
        if selection.among is None:
            inside = torch.ones((), device=score.device).expand_as(score)
        else:
            inside = selection.among[name].float()
            score = score.where(selection.among[name], 0)
        sizes = self.sums(as_cube(inside, transposed).double())
        sums = self.sums(as_cube(score, transposed).double())
        return (sums / sizes.clamp_min(1)).float(), sizes.long()

    def _weights_of(self, selection: Selection, name: str, units: Tensor) -> Tensor:
        shape, transposed = selection.scores[name].shape, name in selection.transposed
        whole = self.spread(units, cube(shape, transposed))
        mask = from_cube(whole, shape, transposed)
        return mask if selection.among is None else mask & selection.among[name]


class _Ranked(NamedTuple):
    """Units of a layer, the best first, on the CPU; those without weights left out."""

    means: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, means: Tensor, sizes: Tensor) -> _Ranked:
        means, sizes = means.flatten().cpu(), sizes.flatten().cpu()
        means, sizes = means[sizes > 0], sizes[sizes > 0]
        means, order = means.sort(descending=True, stable=True)
        return cls(means, sizes[order])

    def reach(self, weights: int) -> int:
        """Return how many of the first units have at least ``weights`` together."""
        short = int((self.sizes.cumsum(0) < weights).sum())
        return min(short + 1, len(self.sizes)) if weights else 0

    def fit(self, weights: int) -> int:
        """Return how many of the first units have at most ``weights`` together."""
        return int((self.sizes.cumsum(0) <= weights).sum())


def _units_for(
    counts: Counts,
    order: Mapping[str, _Ranked],
    first: Mapping[str, int],
    apart: bool,
) -> Counts:
    """Return how many units are kept for so many weights: of all, or of each layer.

    Where all compete, the ``first`` of each layer are kept before.
    """
    if not isinstance(counts, int):
        units = {name: order[name].fit(count) for name, count in counts.items()}
        if apart:
            return {n: max(k, min(1, len(order[n].sizes))) for n, k in units.items()}
        if not any(units.values()):
            units[max(counts, key=lambda n: (len(order[n].sizes) > 0, counts[n]))] = 1
        return units
    used = sum(int(order[n].sizes[:k].sum()) for n, k in first.items())
    means = torch.cat([order[n].means[k:] for n, k in first.items()])
    sizes = torch.cat([order[n].sizes[k:] for n, k in first.items()])
    rest = _Ranked.of(means, sizes)
    return max(1, sum(first.values()) + rest.fit(counts - used))
