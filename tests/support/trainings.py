"""Runs that are stopped, and what runs have written."""

import csv
import json

import pytest
import torch

from fisherprune import train
from fisherprune.runs.config import TrainConfig
from fisherprune.train.clock import Clock
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


def contents(folder):
    """Return all that a run has written, without wall times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[path.name] = path.read_bytes()
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds")
    found["metrics.csv"] = [line.rpartition(",")[0] for line in lines]
    result = json.loads((folder / "results.json").read_text())
    assert set(result.pop("seconds")) == set(Clock().laps)
    if result["scoring"]:
        assert result["scoring"].pop("seconds") >= 0
    without_step_times(result)
    del result["config"]["output_dir"]
    return found | {"results.json": result}


def images_of(config):
    """Return the images of a run."""
    device = torch.device(config.device)
    return load_images(config, config.score_samples, device, quiet=True)
