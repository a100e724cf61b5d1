"""The parts a run splits its images into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherprune import data
from fisherprune.data.dataset import Dataset
from fisherprune.runs.config import TrainConfig
from fisherprune.streams import stream


@dataclass(frozen=True)
class Parts:
    """The images of a run, on its device."""

    train: Dataset
    scoring: Dataset
    """The training images the mask is made on, shuffled: groups mix classes."""
    validation: Dataset
    test: Dataset


def load_parts(config: TrainConfig, device: torch.device, quiet: bool) -> Parts:
    """Load the dataset and choose the images of each part."""
    official, test = data.load(
        config.dataset,
        config.data_dir,
        mirror=config.data_mirror,
        image_size=config.image_size,
        quiet=quiet,
    )
    train, validation = data.train_validation_split(official)
    if config.train_samples is not None:
        train = choose(train, config.train_samples, config.seed, "train_samples")
    scored = len(train) if config.score_samples is None else config.score_samples
    scoring = choose(train, scored, config.seed, "score_samples")
    return Parts(
        train.to(device), scoring.to(device), validation.to(device), test.to(device)
    )


def choose(dataset: Dataset, size: int, seed: int, name: str) -> Dataset:
    """Return a stratified choice of ``size`` images, from a stream of its own."""
    return dataset.subset(
        data.stratified_choice(dataset.labels, size, stream(seed, name), name=name)
    )
