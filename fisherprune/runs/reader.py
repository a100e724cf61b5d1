"""The files of a finished run, read and checked: nothing wrong goes unnoticed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.kinds import COUNT, FINITE, NUMBER, SHARE, SWITCH, Kind
from fisherprune.runs.metrics import METRIC_NAMES, Metrics
from fisherprune.runs.result import FORMAT, LayerCount, RunResult, ScoringCost
from fisherprune.runs.section import TABLE, Section, as_config, read_fields

WEIGHTS = ("best", "last")
"""Which weights were tested: of the best validation, of the last epoch."""
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
        seconds={phase: seconds.get(phase, FINITE) for phase in seconds.content},
        environment=content.get("environment", TABLE),
        notes=_notes(content, layers),
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
    return LayerCount(name, outputs, kept, total)


def _scoring(content: Section) -> ScoringCost | None:
    if content.content.get("scoring") is None:
        return None
    scoring = content.section("scoring")
    return {
        "seconds": scoring.get("seconds", FINITE),
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


def read_epochs(path: Path) -> tuple[Epoch, ...]:
    """Read the epochs after the mask from ``metrics.csv``.

    Returns:
        A row an epoch: epoch, train_loss, validation_accuracy and what else there is;
        None in cells that are empty (not every epoch is validated).

    Raises:
        FisherpruneError: where the file is truncated or no table of epochs.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(reader.fieldnames or ())
            rows = list(reader)
        return tuple(_epoch(row) for row in rows if row["phase"] == "train")
    except OSError as error:
        raise FisherpruneError(f"{path} can't be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise FisherpruneError(
            f"{path} is no table of epochs: truncated, or not written by fisherprune "
            f"({type(error).__name__}: {error})"
        ) from None


def _check_columns(names: Sequence[str]) -> None:
    needed = ("phase", "epoch", "train_loss", "validation_accuracy")
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"no column {missing[0]}")


def _epoch(row: dict[str, str]) -> Epoch:
    values = {
        key: float(value) if value else None
        for key, value in row.items()
        if key != "phase"
    }
    for needed in ("epoch", "train_loss"):
        if values[needed] is None:
            raise ValueError(f"no {needed} in a row")
    return values
