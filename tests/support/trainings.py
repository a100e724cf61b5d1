"""Runs that are stopped, and what runs have written."""

import csv

import pytest
import torch

from fisherprune import train
from fisherprune.runs.config import TrainConfig
from fisherprune.train.images import load_images

SMALL_COMMAND = (
    "--dataset digits --model resnet20 --train-samples 40 --score-samples 20 "
    "--epochs 1 --device cpu"
).split()


def small_run(**fields):
    """Return a run of one short epoch."""
    small = {"model": "resnet20", "dataset": "digits", "train_samples": 65}
    small |= {"score_samples": 20, "epochs": 1, "device": "cpu"}
    return TrainConfig(**small | fields)


class Stop(Exception):
    """Ends a run as a kill would: nothing catches it."""


def stopped(config, folder, checkpoint=1):
    """Do a run until it has written so many checkpoints."""
    left = iter(range(1, checkpoint))

    def stop():
        if next(left, None) is None:
            raise Stop

    with pytest.raises(Stop):
        train.run(config, folder=folder, quiet=True, checkpointed=stop)


def rows(folder):
    """Return metrics.csv without the wall times."""
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert all(float(row.pop("seconds")) >= 0 for row in table)
    return table


def without_step_times(result):
    """Leave out of results.json how long steps took."""
    for name in ("dense_step", "sparse_step"):
        if result["execution"]:
            assert result["execution"].pop(name) > 0


def images_of(config):
    """Return the images of a run."""
    device = torch.device(config.device)
    return load_images(config, config.score_samples, device, quiet=True)
