"""Scores: the formulas of criteria applied to weights and statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import Parameters, check_finite
from fisherprune.scoring.criteria import Criterion, Statistics, get_criterion
from fisherprune.shards import as_shard, is_shard, largest, part_of
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.passes import ModelStatistics, Task, checked_task
from fisherprune.statistics.ranks import together
from fisherprune.statistics.run import statistics_of
from fisherprune.statistics.settings import Settings
from fisherprune.statistics.store import BESIDE, Store, final_store
from fisherprune.streams import stream

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def score(
    model: nn.Module,
    batches: Batches,
    criterion: str = "fts",
    *,
    loss_fn: LossFn | None = None,
    losses: Losses | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Score every weight; higher is kept. Scores do not depend on a sparsity.

    Criteria that read the mean gradient alone (snip, grad_norm) never run the model for
    each sample: where ``gradient_moments`` would, the gradient of all parameters comes
    from plain autograd. Then that samples mix is seen in outputs and losses alone.

    Args:
        model: any module; run in eval mode and left as found.
        batches: iterable of ``(inputs, labels)``; not read by data-free criteria. GraSP
            reads it twice, as snip and grad_norm may (an iterator that can be read only
            once is held in memory).
        criterion: one of ``criteria()``.
        loss_fn: as in ``gradient_moments``; cross-entropy by default. OBD takes those
            of ``gauss_newton_diagonal``.
        losses: as in ``gradient_moments``.
        group_size: as in ``gradient_moments``.
        parameters: by name, ``prunable_parameters(model)`` by default.
        seed: of all random numbers: of criteria that draw them, and of passes.
        settings: what passes can be told, see ``Settings``: also where sums and scores
            are kept that have no room beside the model.
        progress: whether to show a bar over the batches, with tqdm, on stderr.
        process_group: as in ``gradient_moments``: ranks that score each its batches get
            the same scores, those of all samples. What reads no data each rank finds by
            itself; the input of ones of synflow has the shape of the first rank's that
            has a batch. For prospr, ntk_sap and passes registered without
            ``over_ranks`` each rank passes over the batches of all, those of the first
            rank first: this takes as long as in one process.

    Returns:
        float32 scores by parameter name, each of its parameter's shape, on its device
            and in its shards, or where ``settings.offload`` says. Where squares of
            gradients leave float32's range, formulas are computed in float64; scores
            that would leave it, too, are all times one power of two.

    Raises:
        FisherpruneError: where the criterion is unknown, a score is NaN or infinite, or
            for any reason of ``gradient_moments``.
    """
    return score_all(
        model,
        batches,
        [criterion],
        loss_fn=loss_fn,
        losses=losses,
        group_size=group_size,
        parameters=parameters,
        seed=seed,
        settings=settings,
        progress=progress,
        process_group=process_group,
    )[criterion]


def score_all(
    model: nn.Module,
    batches: Batches,
    criteria: Iterable[str],
    *,
    loss_fn: LossFn | None = None,
    losses: Losses | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Score by several criteria from one pass over the data; see ``score``.

    Returns:
        Scores by parameter name, by criterion.

    Raises:
        FisherpruneError: for any reason of ``score``, and where ``criteria`` is one
            string.
    """
    with together(process_group):
        if isinstance(criteria, str):
            raise FisherpruneError(
                f"score_all: criteria must be a list of codes, got {criteria!r}; score "
                "takes one"
            )
        chosen = scoring_criteria(criteria)
        options = loss_fn, group_size, progress, losses, settings, seed
        task = checked_task(model, batches, parameters, *options, process_group)
        task = agreed(task, criteria=[each.code for each in chosen])
        return score_task(task, chosen)


def score_task(
    task: Task,
    criteria: list[Criterion],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Run the passes that criteria need, apply the criteria; see ``score_all``."""
    found = statistics_of(task, needs_of(criteria))
    weights = task.parameters if weights is None else weights
    store = final_store(task.settings)
    return score_from(weights, found, criteria, seed=task.seed, store=store)


def scoring_criteria(codes: Iterable[str]) -> list[Criterion]:
    """Return the criteria of codes.

    Raises:
        FisherpruneError: where a criterion is unknown or scores nothing.
    """
    chosen = [get_criterion(code) for code in codes]
    if any(criterion.code == "none" for criterion in chosen):
        raise FisherpruneError(
            "criterion 'none' is the dense baseline: it scores nothing; leave the "
            "model unpruned"
        )
    return chosen


def needs_of(criteria: Iterable[Criterion]) -> frozenset[str]:
    """Return the passes that criteria need together."""
    return frozenset[str]().union(*(criterion.needs for criterion in criteria))


@torch.no_grad()
def score_from(
    weights: Mapping[str, Tensor],
    found: ModelStatistics,
    criteria: Iterable[Criterion],
    *,
    seed: int = 0,
    store: Store = BESIDE,
) -> dict[str, dict[str, Tensor]]:
    """Apply the formulas of criteria to weights and statistics; no data is read.

    Args:
        weights: by name, as they were in ``statistics_of``; in rounds of pruning those
            that were removed as they were before.
        found: what ``statistics_of`` returned for ``needs_of(criteria)``.
        criteria: of ``scoring_criteria``.
        seed: of the random criterion.
        store: where scores are kept.

    Returns:
        Scores by parameter name, by criterion.

    Raises:
        FisherpruneError: where statistics are missing, or a score is NaN or infinite.
    """
    scores: dict[str, dict[str, Tensor]] = {}
    for criterion in criteria:
        if missing := criterion.needs - {*found.passes}:
            raise FisherpruneError(
                f"score_from: statistics for {criterion.code} must hold "
                f"{', '.join(sorted(missing))}, got {found.passes}"
            )
        named = {
            name: store.keep(
                _like(criterion.score(_known(name, weight, found, seed)), weight)
            )
            for name, weight in weights.items()
        }
        check_finite(named, f"the {criterion.code} score")
        scores[criterion.code] = _in_float32(named, store) if found.exponents else named
    return scores


def _in_float32(scores: dict[str, Tensor], store: Store) -> dict[str, Tensor]:
    """Return float64 scores as float32, times a power of two where they leave range."""
    top = max(largest(scores, absolute=True).values(), default=0.0)
    exponent = math.frexp(top)[1]
    factor = 1.0 if -64 <= exponent <= 127 else 2.0**-exponent
    return {name: store.keep((s * factor).float()) for name, s in scores.items()}


def _like(scores: Tensor, weight: Tensor) -> Tensor:
    """Return scores that are split as their weight is, of a formula's whole ones."""
    if not is_shard(scores):
        return as_shard(part_of(scores, weight), weight)
    return scores.redistribute(placements=weight.placements)  # type: ignore[attr-defined]


def _known(name: str, weight: Tensor, found: ModelStatistics, seed: int) -> Statistics:
    """Return what formulas read of one parameter."""
    weight = weight.detach().float()
    parts = {n: named[name].to(weight.device) for n, named in found.parts.items()}
    if found.exponents:  # then float64 holds the values
        weight = weight.double()
        parts = {
            letter: part.double() * 2.0 ** -found.exponents.get(letter, 0)
            for letter, part in parts.items()
        }
    return Statistics(weight, found.group_size, stream(seed, name), **parts)
