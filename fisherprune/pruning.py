"""Score, select, apply: pruning at initialization in one call."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.masks.plan import Plan
from fisherprune.masks.ties import checked_ties
from fisherprune.parameters import (
    Parameters,
    fitted_names,
    plain_parameters,
    transposed_names,
)
from fisherprune.scoring.score import score_task, scoring_criteria
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.passes import checked_task
from fisherprune.statistics.settings import Settings


def _plain_names(model: nn.Module, parameters: Parameters) -> dict[str, str]:
    """Return the names of parameters in the model, by which masks are applied.

    Raises:
        FisherpruneError: where the model has another parameter of a name, or none.
    """
    own = plain_parameters(model)
    names = fitted_names(parameters, own) or {}
    for name, parameter in parameters.items():
        if own.get(names.get(name, name)) is not parameter:
            raise FisherpruneError(
                f"parameters: {name!r} must be a name of the model's "
                "named_parameters(), by which masks are applied"
            )
    return names


def prune(
    model: nn.Module,
    batches: Batches,
    criterion: str = "fts",
    sparsity: float = 0.9,
    scope: str = "global",
    *,
    densities: Mapping[str, float] | None = None,
    min_per_layer: int = 0,
    structure: str = "weights",
    loss_fn: LossFn | None = None,
    losses: Losses | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    ties: str = "error",
    progress: bool = False,
) -> Masks:
    """Score, keep the largest, set the other weights of ``model`` to zero.

    Where no weight of a layer is kept, a ``LayerCollapseWarning`` names the layer.

    Args:
        model: any module; but for the zeros it is left as found.
        batches: iterable of ``(inputs, labels)``, as in ``score``.
        criterion: one of ``criteria()``.
        sparsity: fraction of the weights removed, in [0, 1]; see ``keep_count``.
        scope: "global", "layer", "erk", "erk_plus", "uniform_plus" or "densities", as
            in ``select_masks``.
        densities: by parameter name, for scope "densities" alone.
        min_per_layer: number of weights that each layer keeps at least.
        structure: "weights", "channels", "blocks:RxC" or "N:M", as in ``select_masks``;
            what are outputs of a transposed layer is known here.
        loss_fn: as in ``gradient_moments``; cross-entropy by default.
        losses: as in ``gradient_moments``.
        group_size: samples whose mean gradient is squared, as in ``gradient_moments``.
        parameters: by name, ``prunable_parameters(model)`` by default.
        seed: of all random numbers, as in ``score``.
        settings: what passes can be told, see ``Settings``.
        ties: "error" or "position", as in ``select_masks``.
        progress: whether to show a bar over the batches, with tqdm, on stderr.

    Returns:
        The masks, by the names of the model where it is not wrapped, whether or not it
        is; ``masks.hold(model, optimizer)`` keeps the zeros through training.

    Raises:
        FisherpruneError: for any reason of ``score`` and ``select_masks``; the model is
            then left as it was.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
        >>> batches = [(torch.randn(16, 5), torch.randint(3, (16,)))]
        >>> prune(net, batches, "fts", sparsity=0.9)
        Masks(1 parameters, 4 of 40 weights kept)
        >>> int(torch.count_nonzero(net[0].weight))
        4
    """
    checked_ties(ties)
    chosen = scoring_criteria([criterion])
    options = loss_fn, group_size, progress, losses, settings, seed
    task = checked_task(model, batches, parameters, *options)
    names = _plain_names(model, task.parameters)
    shapes = {name: p.shape for name, p in task.parameters.items()}
    plan = Plan(
        shapes,
        scope,
        densities=densities,
        min_per_layer=min_per_layer,
        structure=structure,
        transposed=transposed_names(model, task.parameters),
    )
    plan.counts(sparsity)  # before any pass, see that there are such masks
    masks = plan.select(score_task(task, chosen)[criterion], sparsity, ties)
    masks = Masks({names[name]: mask for name, mask in masks.items()})
    masks.apply_(model)
    return masks
