"""How long a run will take, from those that are finished."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.store import Run
from fisherprune.files import read_json
from fisherprune.runs.config import resolve_device
from fisherprune.runs.environment import device_name
from fisherprune.runs.folder import CHECKPOINT, METRICS, RESULTS

ALIKE = (
    "model",
    "dataset",
    "image_size",
    "train_samples",
    "batch_size",
    "amp",
    "compile",
    "memory_format",
    "validation_every",
)
"""Fields in which runs must agree for their epochs to take the same time."""


def seconds_needed(run: Run) -> float | None:
    """Return about how long a run will take on this machine; None where unknown.

    The longest finished run of as many epochs counts; without one, the slowest epoch of
    others of the same model and data. Epochs that a run has behind it are taken off.
    """
    epochs = _epochs(asdict(run.config))
    same, rates = [], []
    for seconds, others in _finished(run):
        rates.append(seconds / max(1, others))
        if others == epochs:
            same.append(seconds)
    if not rates:
        return None
    whole = max(same) if same else max(rates) * max(1, epochs)
    return whole * (1 - _done(run) / max(1, epochs))


def _finished(run: Run) -> list[tuple[float, int]]:
    """Return seconds and epochs of the finished runs that are like this one."""
    device = device_name(resolve_device(run.config.device))
    found = []
    for path in (run.results / "runs").glob(f"*/{RESULTS}"):
        try:
            content = read_json(path)
            config, there = content["config"], content["environment"]["device"]
            alike = all(config[k] == getattr(run.config, k) for k in ALIKE)
            if alike and there == device:
                seconds, epochs = sum(content["seconds"].values()), _epochs(config)
                found.append((float(seconds), int(float(epochs))))
        except (FisherpruneError, LookupError, TypeError, ValueError, OverflowError):
            continue  # told where the run itself is looked at
    return found


def _epochs(config: dict) -> int:
    return config["warmup_epochs"] + config["epochs"]


def _done(run: Run) -> int:
    """Return how many epochs an interrupted run has behind it."""
    if not (run.folder / CHECKPOINT).exists():
        return 0
    return len(_rows(run.folder / METRICS))


def _rows(path: Path) -> list:
    try:
        with path.open(encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError):
        return []
