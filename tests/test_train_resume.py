"""A run that was ended, whenever, goes on and ends in the same bits."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fisherprune import checkpoint, runs, train
from fisherprune.checkpoint import MAGIC, Checkpoint
from fisherprune.config import TrainConfig
from fisherprune.errors import FisherpruneError

SOURCE = Path(train.__file__).parents[1]


class Stop(Exception):
    """Ends a run as a kill would: nothing catches it."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path):
    return TrainConfig(
        model="resnet20",
        dataset="digits",
        train_samples=65,
        score_samples=20,
        warmup_epochs=1,
        epochs=3,
        lr=0.05,
        lr_drops=(2,),
        device="cpu",
        output_dir=str(tmp_path / "runs"),
    )


def contents(folder):
    """Return all that a run has written, without wall times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found[path.name] = path.read_bytes()
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds")
    found["metrics.csv"] = [line.rpartition(",")[0] for line in lines]
    found["config.json"] = (folder / "config.json").read_text()
    result = json.loads((folder / "results.json").read_text())
    assert set(result.pop("seconds")) == set(train.Clock().laps)
    return found | {"results.json": result}


def stop_at(monkeypatch, owner, name, call, after=False):
    """Let the ``call``-th call of a function end the run, before or after it."""
    calls, original = [], getattr(owner, name)

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Stop
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, stopping)


STOPS = {
    "in the first epoch": (train.Trainer, "_validate", 1),
    "in a later epoch": (train.Trainer, "_validate", 3),
    "before the row": (runs.RunFolder, "add_epoch", 2),
    "after the row": (runs.RunFolder, "add_epoch", 3, True),
    "before the first checkpoint": (Checkpoint, "_write", 1),
    "before the mask": (train, "make_masks", 1),
    "after the mask": (train, "make_masks", 1, True),
    "after the mask's file": (runs.RunFolder, "save_masks", 1, True),
    "after the mask's checkpoint": (Checkpoint, "_write", 2, True),
    "between the checkpoint and the best weights": (train.Run, "_save_best", 1),
    "after the best weights": (train.Run, "_save_best", 1, True),
    "after all epochs": (Checkpoint, "_write", 5, True),
    "after the last weights": (runs.RunFolder, "save_weights", -1, True),
    "in the test": (train, "evaluate", 1, True),
    "before the result": (runs.RunFolder, "write_json", 2),
}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Return the contents of an undisturbed run, for each config."""
    known = {}

    def of(config):
        key = json.dumps(asdict(config), sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("truth") / "run"
            train.run(config, folder=folder, quiet=True)
            known[key] = contents(folder)
        return known[key]

    return of
