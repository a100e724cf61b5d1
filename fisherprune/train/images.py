"""The images of a run, chosen for what each are used for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherprune import data
from fisherprune.data.dataset import Dataset
from fisherprune.runs.parts.data import DataConfig
from fisherprune.streams import stream


@dataclass(frozen=True)
class Images:
    """The images of a run, on its device."""

    train: Dataset
    scoring: Dataset
    """The training images the mask is made on, shuffled: groups mix classes."""
    validation: Dataset
    """Empty where the config holds out none."""
    test: Dataset


def load_images(
    config: DataConfig, score_samples: int | None, device: torch.device, quiet: bool
) -> Images:
    """Load the dataset and choose the images for each use.

    Args:
        config: which images.
        score_samples: how many of the training images to score on; None: all.
        device: where they are to be.
        quiet: show no progress.
    """
    official, test = data.load(
        config.dataset,
        config.data_dir,
        mirror=config.data_mirror,
        image_size=config.image_size,
        quiet=quiet,
    )
    train, validation = data.train_validation_split(official, config.validation_share)
    if config.train_samples is not None:
        train = choose(train, config.train_samples, config.seed, "train_samples")
    scored = len(train) if score_samples is None else score_samples
    scoring = choose(train, scored, config.seed, "score_samples")
    return Images(
        train.to(device), scoring.to(device), validation.to(device), test.to(device)
    )


def choose(dataset: Dataset, size: int, seed: int, name: str) -> Dataset:
    """Return a stratified choice of ``size`` images, from a stream of its own."""
    return dataset.subset(
        data.stratified_choice(dataset.labels, size, stream(seed, name), name=name)
    )
