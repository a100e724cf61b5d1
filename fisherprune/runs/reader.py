"""The files of a finished run, read and checked: nothing wrong goes unnoticed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.kinds import COUNT, FINITE, NUMBER, SHARE, SWITCH, Kind
from fisherprune.runs.metrics import METRIC_NAMES, Metrics
from fisherprune.runs.result import (
    FORMAT,
    Execution,
    FlopCount,
    LayerCount,
    RunResult,
    ScoringCost,
)
from fisherprune.runs.section import TABLE, Section, as_config, read_fields

WEIGHTS = ("best", "last")
"""Which weights were tested: of the best validation, of the last epoch."""
LARGEST = 3.5e38
"""More than any float32: a larger number is no measurement."""
SECONDS: Kind[float] = Kind(
    f"a number of at most {LARGEST:g}",
    lambda value: FINITE.accepts(value) and abs(value) <= LARGEST,
    float,
)
LIST: Kind[list[object]] = Kind("a list", lambda value: isinstance(value, list))

Epoch = Mapping[str, "float | None"]


@dataclass(frozen=True)
class FinishedRun(RunResult):
    """The result of a run, with what its folder tells besides."""

    name: str = ""
    """Its folder, seen from the folder that was given."""
    epochs: tuple[Epoch, ...] = ()
    """The rows of metrics.csv after the mask; empty where there is no such file."""


def read_run(path: Path, name: str) -> FinishedRun:
    """Read the result file of a finished run.

    Args:
        path: ``results.json``.
        name: what to call the run.

    Returns:
        The run, yet without its epochs: see ``read_epochs``.

    Raises:
        FisherpruneError: where the file is truncated, foreign or of another version.
    """
    content = read_fields(path)
    check_format(content)
    config, test = as_config(content.section("config")), content.section("test")
    layers, seconds = _layers(content.section("layers")), content.section("seconds")
    return FinishedRun(
        name=name,
        folder=path.parent,
        config=config,
        parameters=content.get("parameters", COUNT),
        last=_metrics(test.section("last")),
        best=_metrics(test.section("best")),
        best_epoch=content.get("best_epoch", _epoch_of(config)),
        layers=layers,
        scoring=_scoring(content),
        seconds={phase: seconds.get(phase, SECONDS) for phase in seconds.content},
        environment=content.get("environment", TABLE),
        notes=_notes(content, layers),
        flops=_flops(content),
        execution=_execution(content),
    )


def check_format(content: Section, wanted: int = FORMAT) -> None:
    """Raise FisherpruneError where a file says that it is of another format."""
    number = content.content.get("format")
    if type(number) is not int or number != wanted:
        got = f"{shown(number)}: not written by this version of fisherprune"
        raise FieldError(content.place("format"), str(wanted), got)


def _epoch_of(config: TrainConfig) -> Kind[int]:
    words = f"in [0, {config.epochs}], the epochs of the run"
    return Kind(words, lambda v: COUNT.accepts(v) and v <= config.epochs)


def _metrics(section: Section) -> Metrics:
    """Return metrics; the loss of an older file may be infinite or not a number."""
    kinds = {name: NUMBER if name == "loss" else SHARE for name in METRIC_NAMES}
    return Metrics(**{name: section.get(name, kind) for name, kind in kinds.items()})


def _layers(section: Section) -> tuple[LayerCount, ...]:
    if not section.content:
        raise FisherpruneError(
            f"{section.file}: {section.path} must hold at least one layer, got {{}}"
        )
    return tuple(_layer(name, each) for name, each in section.sections().items())


def _layer(name: str, section: Section) -> LayerCount:
    kept, total = section.get("kept", COUNT), section.get("total", COUNT)
    if not kept <= total or total == 0:
        raise FisherpruneError(
            f"{section.file}: {section.path} must keep from 0 to all of at least one "
            f"weight, got {kept} of {total}"
        )
    outputs = section.get("outputs", COUNT) if "outputs" in section.content else None
    effective = _optional(section, "effective")
    if effective is not None and effective > kept:
        wanted = f"at most {kept}, the weights kept"
        raise section.wrong("effective", wanted, effective)
    return LayerCount(name, outputs, kept, total, effective)


def _optional(section: Section, name: str) -> int | None:
    """Return a count; None where it is not known, as in older files."""
    known = section.content.get(name) is not None
    return section.get(name, COUNT) if known else None


def _flops(content: Section) -> FlopCount | None:
    if content.content.get("flops") is None:
        return None
    found = content.section("flops")
    dense, masked = found.get("dense", COUNT), found.get("masked", COUNT)
    if masked > dense:
        wanted = f"at most {dense}, those of the dense network"
        raise found.wrong("masked", wanted, masked)
    return {"dense": dense, "masked": masked}


def _execution(content: Section) -> Execution | None:
    if content.content.get("execution") is None:
        return None
    found = content.section("execution")
    seconds = {
        name: None if found.content.get(name) is None else found.get(name, SECONDS)
        for name in ("dense_step", "sparse_step")
    }
    return {
        "sparse_layers": found.get("sparse_layers", COUNT),
        "expected": found.get("expected", SECONDS),
        "dense_step": seconds["dense_step"],
        "sparse_step": seconds["sparse_step"],
        "weights": found.get("weights", COUNT),
        "dense_weights": found.get("dense_weights", COUNT),
        "optimizer": found.get("optimizer", COUNT),
        "dense_optimizer": found.get("dense_optimizer", COUNT),
    }


def _scoring(content: Section) -> ScoringCost | None:
    if content.content.get("scoring") is None:
        return None
    scoring = content.section("scoring")
    return {
        "seconds": scoring.get("seconds", SECONDS),
        "samples": scoring.get("samples", COUNT),
        "cached": scoring.get("cached", SWITCH),
    }


def _notes(content: Section, layers: tuple[LayerCount, ...]) -> tuple[str, ...]:
    """Return the notes; older files hold them among the warnings of layers."""
    if "notes" in content.content:
        return tuple(map(str, content.get("notes", LIST)))
    names = tuple(layer.name for layer in layers)
    warnings = map(str, content.get("warnings", LIST))
    return tuple(text for text in warnings if not text.startswith(names))


def read_epochs(path: Path, epochs: int) -> tuple[Epoch, ...]:
    """Read the epochs after the mask from ``metrics.csv``.

    Args:
        path: the file.
        epochs: of the run.

    Returns:
        A row an epoch: epoch, train_loss, validation_accuracy and what else there is;
        None in cells that are empty (not every epoch is validated).

    Raises:
        FisherpruneError: where the file is truncated or no table of epochs, or holds
            values that no epoch of the run can have.
    """
    columns = _columns(epochs)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := {"phase", *columns} - {*(reader.fieldnames or ())}:
                raise ValueError(f"no column {min(missing)}")
            rows = tuple(_numbers(row) for row in reader if row["phase"] == "train")
    except OSError as error:
        raise FisherpruneError(f"{path} can't be read: {error.strerror}") from None
    except (TypeError, ValueError, csv.Error) as error:
        raise FisherpruneError(
            f"{path} is no table of epochs: truncated, or not written by fisherprune "
            f"({type(error).__name__}: {error})"
        ) from None
    for row in rows:
        for name, kind in columns.items():
            if not kind.accepts(row[name]):
                raise FieldError(f"{path}: {name}", kind.words, shown(row[name]))
    return rows


def _columns(epochs: int) -> dict[str, Kind[Any]]:
    """Return what the values of an epoch must be, by column."""
    return {
        "epoch": Kind(f"in 1, 2, ..., {epochs}", range(1, epochs + 1).__contains__),
        "train_loss": Kind(
            f"at most {LARGEST:g}, infinite or not a number",
            lambda value: NUMBER.accepts(value) and not LARGEST < abs(value) < math.inf,
        ),
        "validation_accuracy": Kind(
            "in [0, 1]", lambda value: value is None or SHARE.accepts(value)
        ),
    }


def _numbers(row: dict[str, str]) -> Epoch:
    cells = {name: cell for name, cell in row.items() if name != "phase"}
    return {name: float(cell) if cell else None for name, cell in cells.items()}
