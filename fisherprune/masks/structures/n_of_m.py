"""Structure "N:M": of M consecutive inputs at most N are kept, everywhere."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisherprune.errors import FieldError
from fisherprune.masks.counts import ROUNDING, Counts, Shapes
from fisherprune.masks.devices import check_finite
from fisherprune.masks.structures.layout import as_cube, cube, from_cube
from fisherprune.masks.structures.registry import (
    Selection,
    Structure,
    Tensors,
    register_structure,
)
from fisherprune.masks.ties import few_ties, refuse_equal


@register_structure("N:M", "N of M consecutive inputs, as 2:4", r"(\d+):(\d+)")
@dataclass(frozen=True)
class NOfM(Structure):
    """Groups of M along the inputs, for each output and each tap of a kernel.

    So a Linear weight [out, in] is as GPUs multiply it, and a convolution's is in the
    memory format channels_last, [out, height, width, in]. A smaller last group of k
    keeps min(k, N), as if zeros filled it up; so a layer with one input for each
    output, a bias or a depthwise convolution, keeps all. Mishra et al. 2021,
    "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        """Refuse groups that keep none, or more than they have."""
        if not 1 <= self.kept <= self.of:
            raise FieldError("structure", "N:M with 1 <= N <= M", repr(self.text))

    @property
    def text(self) -> str:
        """Return how it is written."""
        return f"{self.kept}:{self.of}"

    def check(self, scope: str, min_per_layer: int) -> None:
        """Refuse what would have layers keep another share."""
        why = f"for structure {self.text}, which keeps the same share everywhere"
        if scope not in ("global", "layer"):
            raise FieldError("scope", f"global or layer {why}", scope)
        if min_per_layer:
            raise FieldError("min_per_layer", f"0 {why}", min_per_layer)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse another sparsity than that of a group."""
        removed = 1 - Fraction(self.kept, self.of)
        if abs(Fraction(repr(float(sparsity))) - removed) > ROUNDING:
            wanted = f"{float(removed)!r} for structure {self.text}"
            raise FieldError("sparsity", wanted, sparsity)

    def step(self, sparsity: float) -> tuple[Structure, float]:
        """Keep another whole number of M, not less than the sparsity says."""
        share = 1 - Fraction(repr(float(sparsity))) - ROUNDING
        kept = min(self.of, max(self.kept, math.ceil(share * self.of)))
        return NOfM(kept, self.of), 1 - kept / self.of

    def counts(
        self, counts: Counts, shapes: Shapes, transposed: Collection[str]
    ) -> Counts:
        """Return what the groups of each layer keep."""
        found = {}
        for name, shape in shapes.items():
            out, inputs, taps = cube(shape, name in transposed)
            full, last = divmod(inputs, self.of)
            found[name] = out * taps * (full * self.kept + min(last, self.kept))
        return found

    def select(self, selection: Selection) -> list[Tensors]:
        """Keep the largest of each group."""
        check_finite(selection.scores)
        masks, equal, places = {}, dict[str, int](), 0
        for name, score in selection.scores.items():
            if selection.among is not None:
                score = score.where(selection.among[name], -math.inf)
            transposed = name in selection.transposed
            groups = self._groups(as_cube(score, transposed))
            chosen = self._largest(groups)
            if selection.ties == "error":
                tied, free = self._tied(groups, chosen)
                equal |= {name: tied} if tied else {}
                places += free
            masks[name] = self._mask(chosen, score.shape, transposed)
        if equal:
            refuse_equal(equal, places, f" in groups of {self.of}")
        return [dict(masks) for _ in selection.counts]

    def _groups(self, scores: Tensor) -> Tensor:
        """Return [out, groups, M, taps], filled up with -infinity."""
        out, inputs, taps = scores.shape
        groups = -(-inputs // self.of)
        if more := groups * self.of - inputs:
            scores = pad(scores, (0, 0, 0, more), value=-math.inf)
        return scores.reshape(out, groups, self.of, taps)

    def _largest(self, groups: Tensor) -> Tensor:
        """Mask the N largest of each group, the first of equal ones."""
        order = groups.argsort(dim=2, descending=True, stable=True)[:, :, : self.kept]
        chosen = torch.zeros_like(groups, dtype=torch.bool)
        return chosen.scatter_(2, order, True) & (groups > -math.inf)

    def _tied(self, groups: Tensor, chosen: Tensor) -> tuple[int, int]:
        """Return how many equal scores compete for how many places, if for too many."""
        lowest = groups.where(chosen, math.inf).amin(2, keepdim=True)
        equal = (groups == lowest) & groups.isfinite()
        removed = equal & ~chosen
        kept = equal & chosen & removed.any(2, keepdim=True)
        n_kept, n_removed = int(kept.sum()), int(removed.sum())
        some = n_removed and not few_ties(min(n_kept, n_removed), int(chosen.sum()))
        every = n_removed and n_kept + n_removed == int(groups.isfinite().sum())
        return (n_kept + n_removed, n_kept) if some or every else (0, 0)

    def _mask(self, chosen: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
        out, inputs, taps = cube(shape, transposed)
        whole = chosen.reshape(out, -1, taps) if chosen.numel() else chosen
        return from_cube(whole[:, :inputs], shape, transposed)
