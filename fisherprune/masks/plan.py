"""Plans: how scores become masks, checked before there are scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import cast, overload

from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks import scopes as _scopes  # noqa: F401  # they register
from fisherprune.masks import structures as _structures  # noqa: F401
from fisherprune.masks.checks import checked_among, checked_scores
from fisherprune.masks.counts import Counts, Densities, Shapes, checked_sparsity
from fisherprune.masks.masks import Masks
from fisherprune.masks.room import counts_within
from fisherprune.masks.scopes.registry import SCOPES, Layers, checked_scope
from fisherprune.masks.structures.registry import Selection, structure_of
from fisherprune.masks.ties import checked_ties
from fisherprune.shards import any_shard, count_true

SHARDS = (
    "where scores are in shards, for units may lie on several ranks: score the model "
    "before it is split, and apply the masks to it after"
)


def check_splits(structure: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a structure of units where tensors are in shards.

    Raises:
        FisherpruneError: where they are.
    """
    if structure != "weights" and any_shard(tensors.values()):
        raise FieldError("structure", f"weights {SHARDS}", shown(structure))


def check_pattern(
    scope: str = "global",
    *,
    densities: Densities | None = None,
    min_per_layer: int = 0,
    structure: str = "weights",
    sparsity: float | None = None,
) -> None:
    """Refuse arguments of ``Plan`` that are wrong whatever the parameters are.

    Raises:
        FisherpruneError: where one is, or does not go with another.
    """
    checked_scope(scope, densities)
    whole = isinstance(min_per_layer, int) and not isinstance(min_per_layer, bool)
    if not whole or min_per_layer < 0:
        wanted = "an integer of at least 0"
        raise FieldError("min_per_layer", wanted, shown(min_per_layer))
    chosen = structure_of(structure)
    chosen.check(scope, min_per_layer)
    if sparsity is not None:
        chosen.check_sparsity(checked_sparsity(sparsity))


class Plan:
    """How scores become masks: where they compete, and what is kept together.

    Made before there are scores, so that mistakes are found early, and used for as many
    selections as there are rounds of pruning.

    Args:
        shapes: of the parameters, by name.
        scope: as in ``select_masks``.
        densities: as in ``select_masks``.
        min_per_layer: as in ``select_masks``.
        structure: as in ``select_masks``.
        transposed: as in ``select_masks``.

    Raises:
        FisherpruneError: for any reason of ``select_masks`` but sparsities and scores.

    Example:
        >>> import torch
        >>> plan = Plan({"a": (4, 4), "b": (4, 8)}, "layer")
        >>> plan.counts(0.75)
        {'a': 4, 'b': 8}
        >>> masks = plan.select({"a": torch.rand(4, 4), "b": torch.rand(4, 8)}, 0.5)
        >>> scores = {"a": torch.rand(4, 4), "b": torch.rand(4, 8)}
        >>> plan.select(scores, 0.75, among=masks)
        Masks(2 parameters, 12 of 48 weights kept)
    """

    def __init__(
        self,
        shapes: Shapes,
        scope: str = "global",
        *,
        densities: Densities | None = None,
        min_per_layer: int = 0,
        structure: str = "weights",
        transposed: Collection[str] = (),
    ) -> None:
        check_pattern(
            scope,
            densities=densities,
            min_per_layer=min_per_layer,
            structure=structure,
        )
        self._structure, self._scope = structure_of(structure), SCOPES[scope]
        self._transposed, self._text = frozenset(transposed), structure
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        sizes = Layers(shapes, {}).sizes
        if not any(sizes.values()):
            raise FisherpruneError("select_masks: scores must hold at least one entry")
        self._least = {name: min(min_per_layer, n) for name, n in sizes.items()}
        budgets = self._least
        if min_per_layer:
            budgets = {name: self._budget(name, shapes[name]) for name in sizes}
        self._layers = Layers(shapes, budgets, densities)

    def counts(self, sparsity: float) -> Counts:
        """Return how many weights are kept at a sparsity; no score is needed.

        Units of several weights ("channels", "blocks:RxC") can't be split: of them at
        most so many weights are kept, see ``select_masks``.

        Args:
            sparsity: fraction removed, in [0, 1].

        Returns:
            One number for scope "global", or one for each parameter.

        Raises:
            FisherpruneError: where the sparsity is no such number, or the layers can't
                keep so few or so many weights.
        """
        sparsity = checked_sparsity(sparsity)
        self._structure.check_sparsity(sparsity)
        counts = self._scope.counts(self._layers, sparsity)
        return self._structure.counts(counts, self._layers.shapes, self._transposed)

    def step(self, sparsity: float) -> tuple[Plan, float]:
        """Return the plan and the sparsity of a round on the way to a higher sparsity.

        Another sparsity where the plan can't have this one: a layer of density 0 goes
        in the first round, and "N:M" keeps whole numbers of M.
        """
        size, most = sum(self._layers.sizes.values()), self._scope.most(self._layers)
        plan = copy(self)
        plan._structure, sparsity = self._structure.step(sparsity)
        return plan, max(sparsity, 1 - most / size)

    @overload
    def select(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        ties: str = "error",
        among: Mapping[str, Tensor] | None = None,
    ) -> Masks: ...

    @overload
    def select(
        self,
        scores: Mapping[str, Tensor],
        sparsity: Sequence[float],
        ties: str = "error",
        among: Mapping[str, Tensor] | None = None,
    ) -> list[Masks]: ...

    def select(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float | Sequence[float],
        ties: str = "error",
        among: Mapping[str, Tensor] | None = None,
    ) -> Masks | list[Masks]:
        """Keep the largest scores; see ``select_masks``.

        With ``among`` the masks of the round before, rounds of a growing sparsity keep
        fewer weights in every layer each time, and exactly as many in all as they say.

        Args:
            scores: as in ``select_masks``, of the plan's parameters.
            sparsity: as in ``select_masks``.
            ties: as in ``select_masks``.
            among: as in ``select_masks``.

        Returns:
            Masks, or a list of Masks for a list of sparsities.

        Raises:
            FisherpruneError: for any reason of ``select_masks``.
        """
        checked_ties(ties)
        several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
        sparsities = cast("Sequence[float]", sparsity if several else [sparsity])
        counts = [self.counts(each) for each in sparsities]
        tensors = checked_scores(scores, self._layers.shapes)
        check_splits(self._text, tensors)
        inside = None if among is None else checked_among(among, tensors)
        masks = self._selected(tensors, counts, ties, inside)
        return masks if several else masks[0]

    def _selected(
        self,
        tensors: dict[str, Tensor],
        counts: list[Counts],
        ties: str,
        among: dict[str, Tensor] | None,
    ) -> list[Masks]:
        room, least = self._layers.sizes, self._least
        if among is not None:
            room = count_true(among)
            least = {name: min(n, room[name]) for name, n in least.items()}
            if self._structure.exact:
                spare = 0 if self._scope.apart else 1
                counts = [counts_within(each, room, spare) for each in counts]
        selection = Selection(
            tensors,
            counts,
            least,
            ties,
            among,
            room,
            self._transposed,
            self._scope.apart,
        )
        return [Masks(found) for found in self._structure.select(selection)]

    def _budget(self, name: str, shape: Sequence[int]) -> int:
        """Return how many weights a layer is given so that it keeps its least number.

        Of units of ``u`` weights or less, ``n + u - 1`` weights hold at least ``n``.
        """
        unit = self._structure.unit(shape, name in self._transposed)
        return min(math.prod(shape), self._least[name] + max(unit, 1) - 1)
