"""From a configuration and its images to masks: what happens before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fisherprune.baselines import invert_scores, shuffle_masks
from fisherprune.data.augment import TrainingBatches
from fisherprune.data.dataset import Augmentation, Dataset
from fisherprune.masks.masks import Masks
from fisherprune.masks.select import select_masks
from fisherprune.parameters import prunable_parameters
from fisherprune.progress import WithBar
from fisherprune.runs.config import TrainConfig
from fisherprune.scoring.score import needs_of, score_from
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.run import statistics_of
from fisherprune.streams import stream, stream_seed
from fisherprune.train.parts import Parts


def make_masks(
    config: TrainConfig,
    model: nn.Module,
    parts: Parts,
    statistics: Path | StatisticsCache | None = None,
    quiet: bool = False,
) -> tuple[Masks, dict[str, object]]:
    """Score the weights as the model is now and keep the largest scores.

    Args:
        config: what to do.
        model: the network, after its warm-up epochs.
        parts: the images.
        statistics: folder or cache of statistics that runs share; None: none.
        quiet: show no progress.

    Returns:
        The masks, and what the scores cost: ``seconds`` of the passes over the data
        when they were run, ``samples`` in one pass, and whether all came from the
        cache (``cached``).
    """
    if config.bn_warmup:
        measure_batchnorm(config, model, parts.train, quiet)
    if statistics is not None and not isinstance(statistics, StatisticsCache):
        statistics = StatisticsCache(statistics)
    parameters = prunable_parameters(model, config.skip)
    found = statistics_of(
        model,
        WithBar(parts.scoring.batches(config.score_batch_size), "scoring", quiet=quiet),
        needs_of([config.method]),
        group_size=config.group_size,
        parameters=parameters,
        cache=statistics,
    )
    seed = stream_seed(config.seed, "random scores")
    scores = score_from(parameters, found, [config.method], seed=seed)[config.method]
    if config.invert_scores:
        scores = invert_scores(scores)
    masks = select_masks(
        scores, config.sparsity, config.scope, densities=config.densities
    )
    if config.shuffle_masks:
        masks = shuffle_masks(masks, stream_seed(config.seed, "mask shuffle"))
    cost = {"seconds": found.seconds, "samples": found.samples, "cached": found.cached}
    return masks, cost


@torch.no_grad()
def measure_batchnorm(
    config: TrainConfig, model: nn.Module, train: Dataset, quiet: bool
) -> None:
    """Replace the running statistics of BatchNorm by means over one pass."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    plain = replace(train, augmentation=Augmentation(padding=0, flip=False))
    order = stream(config.seed, "batchnorm order")
    batches = TrainingBatches(plain, config.training_batch_size, order, order)
    model.train()
    for images, _ in WithBar(batches, "batchnorm", quiet=quiet):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
