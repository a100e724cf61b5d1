"""Score, select, apply: pruning at initialization in one call."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.masks.select import kept_counts, select_counted
from fisherprune.parameters import Parameters
from fisherprune.scoring.score import score_task, scoring_criteria
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import LossFn
from fisherprune.statistics.passes import checked_task


def _check_names(model: nn.Module, parameters: Parameters) -> None:
    """Refuse names under which the masks would not find their parameters."""
    own = dict(model.named_parameters())
    for name in parameters:
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
    chosen = scoring_criteria([criterion])
    task = checked_task(model, batches, parameters, loss_fn, group_size)
    _check_names(model, task.parameters)
    shapes = {name: p.shape for name, p in task.parameters.items()}
    counts = kept_counts(shapes, sparsity, scope, densities=densities)
    scores = score_task(task, chosen, seed)[criterion]
    (masks,) = select_counted(scores, [counts])
    masks.apply_(model)
    return masks
