"""Score, select, apply: pruning at initialization in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fisherprune.criteria import Criterion, Statistics, get_criterion
from fisherprune.errors import FisherpruneError
from fisherprune.guards import Batches, Parameters, check_finite, checked_parameters
from fisherprune.losses import LossFn
from fisherprune.masks import Masks
from fisherprune.stats import (
    GradientMoments,
    gradient_moments,
    hessian_gradient_product,
)
from fisherprune.threshold import SCOPES, checked_sparsity, select_masks


def score(
    model: nn.Module,
    batches: Batches,
    criterion: str = "fts",
    *,
    loss_fn: LossFn | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every weight; higher is kept. Scores do not depend on a sparsity.

    Args:
        model: float32 module; run in eval mode and left as found.
        batches: iterable of ``(inputs, labels)``; not read by data-free criteria. GraSP
            reads it twice (an iterator that can be read only once is held in memory).
        criterion: one of ``criteria()``.
        loss_fn: as in ``gradient_moments``; cross-entropy by default.
        group_size: as in ``gradient_moments``.
        parameters: by name, ``prunable_parameters(model)`` by default.
        seed: of the random criterion.

    Returns:
        float32 scores by parameter name, each of its parameter's shape, on its device.

    Raises:
        FisherpruneError: where the criterion is unknown, a score is NaN or infinite, or
            for any reason of ``gradient_moments``.
    """
    return score_all(
        model,
        batches,
        [criterion],
        loss_fn=loss_fn,
        group_size=group_size,
        parameters=parameters,
        seed=seed,
    )[criterion]


def score_all(
    model: nn.Module,
    batches: Batches,
    criteria: Iterable[str],
    *,
    loss_fn: LossFn | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Score by several criteria from one pass over the data; see ``score``.

    Returns:
        Scores by parameter name, by criterion.
    """
    chosen = [_scoring_criterion(code) for code in criteria]
    parameters = checked_parameters(model, parameters)
    needs = frozenset().union(*(criterion.needs for criterion in chosen))
    if "hessian" in needs and isinstance(batches, Iterator):
        batches = list(batches)
    moments = products = None
    if "moments" in needs:
        moments = gradient_moments(
            model, batches, loss_fn, group_size=group_size, parameters=parameters
        )
    if "hessian" in needs:
        products = hessian_gradient_product(
            model, batches, moments, loss_fn, parameters=parameters
        )
    return {
        criterion.code: _scores(criterion, parameters, moments, products, seed)
        for criterion in chosen
    }


def _scoring_criterion(code: str) -> Criterion:
    criterion = get_criterion(code)
    if criterion.score is None:
        raise FisherpruneError(
            f"criterion {code!r} is the dense baseline: it scores nothing; leave the "
            "model unpruned"
        )
    return criterion


@torch.no_grad()
def _scores(
    criterion: Criterion,
    parameters: Parameters,
    moments: GradientMoments | None,
    products: dict[str, Tensor] | None,
    seed: int,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, parameter in parameters.items():
        statistics = Statistics(
            w=parameter.detach(),
            m=moments and moments.mean[name],
            F=moments and moments.fisher[name],
            Hm=products and products[name],
            g=moments.group_size if moments else 1,
            generator=generator,
        )
        scores[name] = criterion.score(statistics)
    check_finite(scores, f"the {criterion.code} score")
    return scores


def prune(
    model: nn.Module,
    batches: Batches,
    criterion: str = "fts",
    sparsity: float = 0.9,
    scope: str = "global",
    *,
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
    if scope not in SCOPES:
        raise FisherpruneError(f"scope must be one of {SCOPES}, got {scope!r}")
    scores = score(
        model,
        batches,
        criterion,
        loss_fn=loss_fn,
        group_size=group_size,
        parameters=parameters,
        seed=seed,
    )
    masks = select_masks(scores, sparsity, scope)
    masks.apply_(model)
    return masks
