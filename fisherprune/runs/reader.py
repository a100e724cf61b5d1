"""The files of one run, read and checked: nothing wrong in them goes unnoticed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from fisherprune.errors import FisherpruneError, shown
from fisherprune.files import read_json
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import METRIC_NAMES
from fisherprune.runs.kinds import NUMBER
from fisherprune.runs.result import FORMAT

WEIGHTS = ("best", "last")
"""Which weights were tested: of the best validation, of the last epoch."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    name: str
    """Its folder, seen from the folder that was given."""
    config: TrainConfig
    test: Mapping[str, Mapping[str, float]]
    """METRIC_NAMES on the test images for each of WEIGHTS."""
    best_epoch: int
    parameters: int
    layers: Mapping[str, tuple[int, int]]
    """Weights kept and all weights of each prunable parameter."""
    seconds: Mapping[str, float]
    """Wall time by phase."""
    environment: Mapping[str, object]
    notes: tuple[str, ...]
    """What the run warned of, besides its layers."""
    reused: float | None
    """Seconds that the statistics took elsewhere, where they came from the cache."""
    epochs: tuple[Mapping[str, float | None], ...]
    """The rows of metrics.csv after the mask; empty where there is no such file."""

    def accuracy(self, weights: str) -> float:
        """Return the test accuracy in percent."""
        return 100 * self.test[weights]["accuracy"]

    @property
    def mask_seconds(self) -> float | None:
        """What the mask costs without a cache; None where it is not recorded."""
        if "scoring" not in self.seconds:
            return None
        return self.seconds["scoring"] + (self.reused or 0)

    @property
    def kept(self) -> int:
        """Prunable weights that are not zero."""
        return sum(kept for kept, _ in self.layers.values())

    @property
    def prunable(self) -> int:
        """All prunable weights."""
        return sum(total for _, total in self.layers.values())

    @cached_property
    def collapsed(self) -> tuple[str, ...]:
        """Layers of which nothing is kept."""
        return tuple(name for name, (kept, _) in self.layers.items() if kept == 0)


class Fields:
    """A JSON object whose values are taken one by one, by what they must be.

    Each ``take_`` method raises FisherpruneError with the file, the place inside it,
    what is required and what came.
    """

    def __init__(self, content: object, path: Path, place: str = "") -> None:
        """Check that ``content`` is an object."""
        self.path, self.place = path, place
        if not isinstance(content, dict):
            what = f"{place} " if place else ""
            raise FisherpruneError(
                f"{path}: {what}must be a JSON object, got {shown(content)}"
            )
        self.content = content

    def take(self, key: str, fits, wanted: str) -> object:
        """Return the value of ``key``, which must fulfil ``fits``."""
        place = f"{self.place}.{key}" if self.place else key
        if key not in self.content:
            raise FisherpruneError(f"{self.path}: {place} is missing")
        value = self.content[key]
        if not fits(value):
            raise FisherpruneError(
                f"{self.path}: {place} must be {wanted}, got {shown(value)}"
            )
        return value

    def take_fields(self, key: str) -> Fields:
        """Return the JSON object under ``key``."""
        value = self.take(key, lambda v: isinstance(v, dict), "a JSON object")
        return Fields(value, self.path, f"{self.place}.{key}" if self.place else key)

    def take_count(self, key: str) -> int:
        """Return a whole number of at least 0, and no more than a count can be."""
        fits = lambda v: _is(int, v) and 0 <= v < 2**63  # noqa: E731
        return self.take(key, fits, "a whole number in [0, 2^63)")

    def take_number(self, key: str) -> float:
        """Return any number; a loss may be infinite or not a number."""
        return float(self.take(key, NUMBER.accepts, "a number"))

    def take_share(self, key: str) -> float:
        """Return a number in [0, 1]."""
        fits = lambda v: _is((int, float), v) and 0 <= v <= 1  # noqa: E731
        return float(self.take(key, fits, "a number in [0, 1]"))

    def take_seconds(self, key: str) -> float:
        """Return a span of time: finite; a clock that jumped may make it negative."""
        fits = lambda v: NUMBER.accepts(v) and math.isfinite(v)  # noqa: E731
        return float(self.take(key, fits, "a finite number"))


def _is(kind, value: object) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def read_fields(path: Path) -> Fields:
    """Read a file that must hold a JSON object; see ``files.read_json``."""
    return Fields(read_json(path), path)


def read_run(path: Path, name: str) -> Run:
    """Read the result file of a finished run.

    Args:
        path: ``results.json``.
        name: what the report calls the run.

    Returns:
        The run, yet without its epochs: see ``read_epochs``.

    Raises:
        FisherpruneError: where the file is truncated, foreign or of another version.
    """
    content = read_fields(path)
    check_format(content)
    test, config = content.take_fields("test"), take_config(content)
    layers = content.take_fields("layers")
    seconds = content.take_fields("seconds")
    return Run(
        folder=path.parent,
        name=name,
        config=config,
        test={weights: _metrics(test.take_fields(weights)) for weights in WEIGHTS},
        best_epoch=_best_epoch(content, config),
        parameters=content.take_count("parameters"),
        layers=_layers(layers),
        seconds={phase: seconds.take_seconds(phase) for phase in seconds.content},
        environment=content.take_fields("environment").content,
        notes=_notes(content, layers),
        reused=_reused(content),
        epochs=(),
    )


def check_format(content: Fields, wanted: int = FORMAT) -> None:
    """Raise FisherpruneError where a file says that it is of another format."""
    number = content.content.get("format")
    if not _is(int, number) or number != wanted:
        raise FisherpruneError(
            f"{content.path}: format must be {wanted}, got {shown(number)}: not "
            "written by this version of fisherprune"
        )


def take_config(content: Fields) -> TrainConfig:
    """Return the configuration under ``config``.

    Raises:
        FisherpruneError: for fields that are not known and values no run can have.
    """
    return as_config(content.take_fields("config"))


def as_config(config: Fields) -> TrainConfig:
    """Return the configuration that a JSON object spells.

    Raises:
        FisherpruneError: for fields that are not known and values no run can have.
    """
    known = {field.name for field in fields(TrainConfig)}
    where = f"{config.place}." if config.place else ""
    if unknown := sorted(set(config.content) - known):
        raise FisherpruneError(
            f"{config.path}: {where}{unknown[0]} is no field of a configuration: not "
            "written by this version of fisherprune"
        )
    try:
        return TrainConfig(**config.content)
    except FisherpruneError as error:
        raise FisherpruneError(f"{config.path}: {where}{error}") from None


def _notes(content: Fields, layers: Fields) -> tuple[str, ...]:
    """Return the warnings but those of layers, which the counts tell as well."""
    warnings = content.take("warnings", lambda v: isinstance(v, list), "a list")
    names = tuple(layers.content)
    return tuple(str(text) for text in warnings if not str(text).startswith(names))


def _reused(content: Fields) -> float | None:
    """Return what cached statistics cost when they were computed.

    None where none came from the cache.
    """
    if content.content.get("scoring") is None:
        return None
    scoring = content.take_fields("scoring")
    if not scoring.take("cached", lambda v: _is(bool, v), "true or false"):
        return None
    return scoring.take_seconds("seconds") or None  # no statistics: no seconds


def _metrics(content: Fields) -> dict[str, float]:
    values = {name: content.take_share(name) for name in METRIC_NAMES if name != "loss"}
    return {"loss": content.take_number("loss")} | values


def _best_epoch(content: Fields, config: TrainConfig) -> int:
    return content.take(
        "best_epoch",
        lambda v: _is(int, v) and 0 <= v <= config.epochs,
        f"in [0, {config.epochs}], the epochs of the run",
    )


def _layers(content: Fields) -> dict[str, tuple[int, int]]:
    if not content.content:
        raise FisherpruneError(
            f"{content.path}: layers must hold at least one layer, got {{}}"
        )
    return {name: _counts(content.take_fields(name)) for name in content.content}


def _counts(content: Fields) -> tuple[int, int]:
    kept, total = content.take_count("kept"), content.take_count("total")
    if not kept <= total or total == 0:
        raise FisherpruneError(
            f"{content.path}: {content.place} must keep from 0 to all of at least one "
            f"weight, got {kept} of {total}"
        )
    return kept, total


def read_epochs(path: Path) -> tuple[dict[str, float | None], ...]:
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


def _epoch(row: dict[str, str]) -> dict[str, float | None]:
    values = {
        key: float(value) if value else None
        for key, value in row.items()
        if key != "phase"
    }
    for needed in ("epoch", "train_loss"):
        if values[needed] is None:
            raise ValueError(f"no {needed} in a row")
    return values
