"""Scores: the formulas of criteria applied to weights and statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import (
    Parameters,
    check_finite,
    checked_parameters,
)
from fisherprune.scoring.criteria import Criterion, Statistics, get_criterion
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import LossFn
from fisherprune.statistics.run import ModelStatistics, statistics_of
from fisherprune.streams import stream


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
        loss_fn: as in ``gradient_moments``; cross-entropy by default, OBD's only one.
        group_size: as in ``gradient_moments``.
        parameters: by name, ``prunable_parameters(model)`` by default.
        seed: of the random criterion; a parameter's scores depend on it, the
            parameter's name and its shape.

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

    Raises:
        FisherpruneError: for any reason of ``score``, and where ``criteria`` is one
            string.
    """
    if isinstance(criteria, str):
        raise FisherpruneError(
            f"score_all: criteria must be a list of codes, got {criteria!r}; score "
            "takes one"
        )
    codes = list(criteria)
    parameters = checked_parameters(model, parameters)
    statistics = statistics_of(
        model,
        batches,
        needs_of(codes),
        loss_fn=loss_fn,
        group_size=group_size,
        parameters=parameters,
    )
    return score_from(parameters, statistics, codes, seed=seed)


def needs_of(criteria: Iterable[str]) -> frozenset[str]:
    """Return the passes that criteria need together.

    Raises:
        FisherpruneError: where a criterion is unknown or scores nothing.
    """
    return frozenset().union(*(_scoring_criterion(code).needs for code in criteria))


def score_from(
    parameters: Parameters,
    statistics: ModelStatistics,
    criteria: Iterable[str],
    *,
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Apply the formulas of criteria to weights and statistics; no data is read.

    Args:
        parameters: the weights by name, as they were in ``statistics_of``.
        statistics: what ``statistics_of`` returned for ``needs_of(criteria)``.
        criteria: of ``fisherprune.criteria()``.
        seed: of the random criterion.

    Returns:
        Scores by parameter name, by criterion.

    Raises:
        FisherpruneError: where a criterion is unknown or its statistics are missing, or
            a score is NaN or infinite.
    """
    chosen = [_scoring_criterion(code) for code in criteria]
    for criterion in chosen:
        if missing := criterion.needs - statistics.kinds:
            raise FisherpruneError(
                f"score_from: statistics for {criterion.code} must hold "
                f"{', '.join(sorted(missing))}, got {sorted(statistics.kinds)}"
            )
    return {c.code: _scores(c, parameters, statistics, seed) for c in chosen}


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
    statistics: ModelStatistics,
    seed: int,
) -> dict[str, Tensor]:
    moments, products = statistics.moments, statistics.products
    curvature, scores = statistics.curvature, {}
    for name, parameter in parameters.items():
        known = Statistics(
            w=parameter.detach(),
            m=moments and moments.mean[name],
            F=moments and moments.fisher[name],
            Hm=products and products[name],
            H=curvature and curvature[name],
            g=moments.group_size if moments else 1,
            generator=stream(seed, name),
        )
        scores[name] = criterion.score(known)
    check_finite(scores, f"the {criterion.code} score")
    return scores
