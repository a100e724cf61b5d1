"""From a configuration and its images to masks: what happens before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fisherprune.augment import TrainingBatches
from fisherprune.config import TrainConfig
from fisherprune.data import Augmentation, Dataset
from fisherprune.masks import Masks
from fisherprune.parts import Parts
from fisherprune.progress import Shown
from fisherprune.prune import score
from fisherprune.streams import stream, stream_seed
from fisherprune.threshold import select_masks


def make_masks(
    config: TrainConfig,
    model: nn.Module,
    parts: Parts,
    statistics: Path | None,
    quiet: bool,
) -> Masks:
    """Score the weights as the model is now and keep the largest scores."""
    if config.bn_warmup:
        measure_batchnorm(config, model, parts.train, quiet)
    scores = score(
        model,
        Shown(parts.scoring.batches(config.score_batch_size), "scoring", quiet=quiet),
        config.method,
        group_size=config.group_size,
        seed=stream_seed(config.seed, "random scores"),
    )
    return select_masks(scores, config.sparsity, config.scope)


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
    for images, _ in Shown(batches, "batchnorm", quiet=quiet):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
