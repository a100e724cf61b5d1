"""Score, select, apply: pruning at initialization in one call."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.masks.select import checked_scope, checked_sparsity, select_masks
from fisherprune.parameters import (
    Parameters,
    checked_model,
)
from fisherprune.scoring.score import score
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import LossFn


def _check_names(model: nn.Module, parameters: Parameters | None) -> None:
    """Refuse names under which the masks would not find their parameters."""
    own = dict(checked_model(model).named_parameters())
    for name in parameters or ():
        if name not in own:
            raise FisherpruneError(
                f"parameters: {name!r} must be a name of the model's "
                "named_parameters(), by which masks are applied"
            )


def prune(
    model: nn.Module,
    batches: Batches,
    criterion: str = "fts",
    sparsity: float = 0.9,
    scope: str = "global",
    *,
    densities: Mapping[str, float] | None = None,
    loss_fn: LossFn | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    seed: int = 0,
) -> Masks:
    """Score, keep the largest, set the other weights of ``model`` to zero.

    Returns:
        The masks; ``masks.hold(model, optimizer)`` keeps the zeros through training.

    Raises:
        FisherpruneError: for any reason of ``score`` and ``select_masks``; the model is
            then left as it was.
    """
    checked_sparsity(sparsity)
    checked_scope(scope, densities)
    _check_names(model, parameters)
    scores = score(
        model,
        batches,
        criterion,
        loss_fn=loss_fn,
        group_size=group_size,
        parameters=parameters,
        seed=seed,
    )
    masks = select_masks(scores, sparsity, scope, densities=densities)
    masks.apply_(model)
    return masks
