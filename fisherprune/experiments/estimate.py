"""How long a run will take, from those that are finished."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import fields

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.store import StudyRun
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.device import device_name, resolve_device
from fisherprune.runs.folder import CHECKPOINT, METRICS, RESULTS
from fisherprune.runs.identity import distinct
from fisherprune.runs.option import Effect, about, names
from fisherprune.runs.parts.data import DataConfig
from fisherprune.runs.parts.seeded import Seeded
from fisherprune.runs.parts.training import TrainingConfig
from fisherprune.runs.reader import read_run

ALIKE = {
    *(set(names(DataConfig)) - set(names(Seeded))),
    *(f.name for f in fields(TrainingConfig) if about(f).effect is Effect.ROUNDING),
    "batch_size",
    "validation_every",
}
"""Fields in which runs must agree for their epochs to take the same time."""


def seconds_needed(run: StudyRun) -> float | None:
    """Return about how long a run will take on this machine; None where unknown.

    The longest finished run of as many epochs counts; without one, the slowest epoch of
    others of the same model and data. Epochs that a run has behind it are taken off.
    """
    epochs = _epochs(run.config)
    finished = list(_finished(run))
    if not finished:
        return None
    same = [seconds for seconds, others in finished if others == epochs]
    rates = [seconds / max(1, others) for seconds, others in finished]
    whole = max(same) if same else max(rates) * max(1, epochs)
    return whole * (1 - _done(run) / max(1, epochs))


def _finished(run: StudyRun) -> Iterator[tuple[float, int]]:
    """Yield seconds and epochs of the finished runs that are like this one."""
    device = device_name(resolve_device(run.config.device))
    for path in (run.results / "runs").glob(f"*/{RESULTS}"):
        try:
            other = read_run(path, path.parent.name)
        except FisherpruneError:  # told where that run itself is looked at
            continue
        alike = _speed(other.config) == _speed(run.config)
        if alike and other.environment.get("device") == device:
            yield sum(other.seconds.values()), _epochs(other.config)


def _speed(config: TrainConfig) -> dict[str, object]:
    """Return what the time of an epoch depends on."""
    return {name: v for name, v in distinct(config).items() if name in ALIKE}


def _epochs(config: TrainConfig) -> int:
    return config.warmup_epochs + config.epochs


def _done(run: StudyRun) -> int:
    """Return how many epochs an interrupted run has behind it."""
    if not (run.folder / CHECKPOINT).exists():
        return 0
    try:
        with (run.folder / METRICS).open(encoding="utf-8") as file:
            return len(list(csv.DictReader(file)))
    except (OSError, ValueError, csv.Error):
        return 0
