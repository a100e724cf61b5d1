"""From a configuration and its images to masks: what happens before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn

from fisherprune.baselines import invert_scores, shuffle_masks
from fisherprune.data.augment import TrainingBatches
from fisherprune.data.dataset import Augmentation, Dataset
from fisherprune.masks.masks import Masks
from fisherprune.parameters import prunable_parameters
from fisherprune.progress import WithBar
from fisherprune.rounds import checked_rounds, select_in_rounds
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.parts.mask import SCORED, SCORED_ON_CUDA, SMALL, MaskConfig
from fisherprune.runs.result import ScoringCost
from fisherprune.scoring.score import needs_of, score_from, scoring_criteria
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batchnorm import measure_batchnorm
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.key import statistics_key
from fisherprune.statistics.passes import Task, passes_for
from fisherprune.statistics.run import statistics_of
from fisherprune.streams import stream, stream_seed
from fisherprune.train.network import mask_plan
from fisherprune.train.ranks import ALONE, Ranks

FIRST_ORDER = frozenset({"moments", "gradient", "gauss_newton"})
"""Passes that keep no graph of a gradient, and find the same whatever the batches."""


def scored_at_once(config: MaskConfig, needs: frozenset[str], images: Tensor) -> int:
    """Return how many images are scored at a time, where they are.

    A GPU computes a small batch of small images faster than it is told to, by a model
    of the kernels and a count of their launches; no GPU has been measured yet.
    """
    if config.score_batch_size is not None:
        return config.score_batch_size
    small = images.shape[-2] * images.shape[-1] <= SMALL**2
    on_gpu = images.device.type == "cuda"
    if on_gpu and small and needs <= FIRST_ORDER:
        return SCORED_ON_CUDA
    return SCORED


def make_masks(
    config: TrainConfig,
    model: nn.Module,
    images: Dataset,
    statistics: Path | StatisticsCache | None = None,
    quiet: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[Masks, ScoringCost]:
    """Score the weights as the model is now and keep the largest scores.

    Of several ranks each scores on its share of the images, whole groups; where a pass
    is not made for ranks, each scores on all of them. Then they keep no statistics.

    Args:
        config: what to do.
        model: the network, after all its warm-up.
        images: to score on.
        statistics: folder or cache of statistics that runs share; None: none.
        quiet: show no progress.
        ranks: of the run.

    Returns:
        The masks, and what the scores cost.
    """
    criteria = scoring_criteria([config.method])
    needs, key = needs_of(criteria), ""
    group = ranks.group
    if group is not None:
        statistics = None
        if all(each.over_ranks for each in passes_for(needs)):
            images = ranks.scored(images, config.group_size)
        else:
            group = None
    if statistics is not None and not isinstance(statistics, StatisticsCache):
        statistics = StatisticsCache(statistics)
    at_once = scored_at_once(config, needs, images.images)
    task = Task(
        model,
        WithBar(images.batches(at_once), "scoring", quiet=quiet),
        prunable_parameters(model, config.skip),
        group_size=config.group_size,
        settings=config.settings,
        seed=stream_seed(config.seed, "random scores"),
        process_group=group,
    )
    task = agreed(task)
    rounds = checked_rounds(config.rounds, config.schedule, criteria[0])
    if rounds.count > 1:
        statistics = None  # no other run will prune the same in its first rounds
    if needs and statistics is not None:
        key = _key(config, task, images, at_once)
    cost: ScoringCost = {"seconds": 0.0, "samples": 0, "cached": True}

    def score(task: Task, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = statistics_of(task, needs, cache=statistics, key=key)
        cost["seconds"] += found.seconds
        cost["samples"] += found.samples
        cost["cached"] &= found.cached
        scores = score_from(weights, found, criteria, seed=task.seed)[config.method]
        return invert_scores(scores) if config.invert_scores else scores

    (masks,) = select_in_rounds(
        task,
        mask_plan(config, model, task.parameters),
        [config.sparsity],
        rounds,
        score,
        regrow=criteria[0].regrow,
        ties=config.ties,
    )
    if config.shuffle_masks:
        masks = shuffle_masks(masks, stream_seed(config.seed, "mask shuffle"))
    masks = ranks.from_first(lambda: masks.to("cpu"))
    return masks.to(images.images.device), cost


def _key(config: TrainConfig, task: Task, scoring: Dataset, at_once: int) -> str:
    """Return the key under which the statistics of a run are kept."""
    about = {
        "model": [config.model, config.model_source],
        "parameters": list(task.parameters),
        "group size": task.group_size,
        "settings": asdict(task.settings),
        "seed": task.seed,
        "batch size": at_once,
        "mean": scoring.mean,
        "std": scoring.std,
    }
    data = scoring.images, scoring.labels
    return statistics_key(about, task.model.state_dict(), data, scoring.images.device)


def warm_up_batchnorm(
    model: nn.Module, train: Dataset, batch_size: int, seed: int, quiet: bool
) -> None:
    """Measure the running statistics of BatchNorm in one pass.

    Args:
        model: the network; its weights stay.
        train: the training images, passed over without augmentation.
        batch_size: images at a time.
        seed: of the run.
        quiet: show no progress.
    """
    plain = replace(train, augmentation=Augmentation(padding=0, flip=False))
    order = stream(seed, "batchnorm order")
    batches = TrainingBatches(plain, batch_size, order, order)
    measure_batchnorm(model, WithBar(batches, "batchnorm", quiet=quiet))
