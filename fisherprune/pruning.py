"""Score, select, apply: pruning at initialization in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.masks import Masks
from fisherprune.masks.plan import Plan, check_splits
from fisherprune.masks.ties import checked_ties
from fisherprune.parameters import (
    Parameters,
    fitted_names,
    plain_parameters,
    transposed_names,
)
from fisherprune.rounds import checked_rounds, select_in_rounds
from fisherprune.scoring.score import score_task, scoring_criteria
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.passes import Task, checked_task
from fisherprune.statistics.ranks import together
from fisherprune.statistics.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    rounds: int | None = None,
    schedule: str = "exponential",
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
    process_group: ProcessGroup | None = None,
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
        rounds: as in ``find_masks``.
        schedule: as in ``find_masks``.
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
        process_group: as in ``score``: ranks that see each its batches get the same
            masks.

    Returns:
        The masks, by the names of the model where it is not wrapped, whether or not it
        is; ``masks.hold(model, optimizer)`` keeps the zeros through training. Of a
        model in shards (``fully_shard``, ``parallelize_module``) they are in the same.

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
    (masks,) = find_masks(
        model,
        batches,
        criterion,
        [sparsity],
        scope,
        rounds=rounds,
        schedule=schedule,
        densities=densities,
        min_per_layer=min_per_layer,
        structure=structure,
        loss_fn=loss_fn,
        losses=losses,
        group_size=group_size,
        parameters=parameters,
        seed=seed,
        settings=settings,
        ties=ties,
        progress=progress,
        process_group=process_group,
    )
    masks.apply_(model)
    return masks


def find_masks(
    model: nn.Module,
    batches: Batches,
    criterion: str = "fts",
    sparsities: Sequence[float] = (0.9,),
    scope: str = "global",
    *,
    rounds: int | None = None,
    schedule: str = "exponential",
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
    process_group: ProcessGroup | None = None,
) -> list[Masks]:
    """Return the masks with which ``prune`` would prune; the model is left as found.

    In rounds, weights are scored, a part of them is removed, and scores are found anew
    of the network that is left, until the sparsity is reached: with n weights, k of
    them kept in the end, round t of T keeps n (k / n)^(t / T) by the schedule
    "exponential", n - (n - k) t / T by "linear". Removed weights stay removed, but for
    criteria (FORCE) in which they may come back.

    Args:
        model: as in ``prune``, as all arguments that are not here.
        batches: read anew in each round.
        criterion: as in ``prune``.
        sparsities: of the masks wanted. All come from one run of rounds to the highest
            of them, a lower one from the scores of the round in which the schedule
            reaches it.
        scope: as in ``prune``.
        rounds: how often scores are found; by default the criterion's own number, 100
            for SynFlow, 60 for FORCE, 1 for most.
        schedule: "exponential" or "linear", in the share of the weights that is kept.
        densities: as in ``prune``.
        min_per_layer: as in ``prune``.
        structure: as in ``prune``. Rounds on the way to "N:M" keep more of each M.
        loss_fn: as in ``prune``.
        losses: as in ``prune``.
        group_size: as in ``prune``.
        parameters: as in ``prune``.
        seed: as in ``prune``; each round draws other random numbers.
        settings: as in ``prune``.
        ties: as in ``prune``.
        progress: as in ``prune``.
        process_group: as in ``prune``.

    Returns:
        Masks for each of the sparsities.

    Raises:
        FisherpruneError: for any reason of ``prune``, or where rounds or schedule are
            not what they must be.

    Reference:
        Tanaka et al. 2020, arXiv 2006.05467; de Jorge et al. 2021, arXiv 2006.09081.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 3))
        >>> batches = [(torch.randn(16, 5), torch.randint(3, (16,)))]
        >>> [m.kept() for m in find_masks(net, batches, "snip", [0.5, 0.9], rounds=5)]
        [20, 4]
    """
    with together(process_group):
        checked_ties(ties)
        chosen = scoring_criteria([criterion])
        how = checked_rounds(rounds, schedule, chosen[0])
        options = loss_fn, group_size, progress, losses, settings, seed
        task = checked_task(model, batches, parameters, *options, process_group)
        names = _plain_names(model, task.parameters)
        if not isinstance(sparsities, Sequence) or isinstance(sparsities, str):
            raise FieldError(
                "sparsities", "a list of numbers in [0, 1]", shown(sparsities)
            )
        plan = Plan(
            {name: p.shape for name, p in task.parameters.items()},
            scope,
            densities=densities,
            min_per_layer=min_per_layer,
            structure=structure,
            transposed=transposed_names(model, task.parameters),
        )
        check_splits(structure, task.parameters)
        for each in sparsities:  # before any pass, see that there are such masks
            plan.counts(each)
        task = agreed(
            task,
            criterion=criterion,
            sparsities=[*sparsities],
            rounds=how,
            plan=(scope, densities, min_per_layer, structure, ties),
        )

        def score(task: Task, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return score_task(task, chosen, weights)[criterion]

        return [
            Masks({names[name]: mask for name, mask in masks.items()})
            for masks in select_in_rounds(
                task, plan, sparsities, how, score, regrow=chosen[0].regrow, ties=ties
            )
        ]
