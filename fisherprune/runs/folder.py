"""The folder of a run: for it alone, every file whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.files import check_writable, write_bytes, write_text
from fisherprune.masks.masks import Masks
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import distinct, identity
from fisherprune.runs.locks import Held, held, sweep
from fisherprune.runs.loggers import LOGGERS, Logger
from fisherprune.runs.metrics import METRIC_NAMES, Metrics
from fisherprune.runs.reader import read_run
from fisherprune.runs.section import as_config, read_fields

CONFIG, METRICS, MASKS = "config.json", "metrics.csv", "masks.safetensors"
CHECKPOINT, RESULTS = "checkpoint.pt", "results.json"
WEIGHTS = ("last.safetensors", "best.safetensors")
ERROR = "error.json"
"""Why a run of a study failed."""
FILES = (CONFIG, METRICS, MASKS, *WEIGHTS, CHECKPOINT, RESULTS)
LOCK = "run.lock"
"""Held by the process that does the run, for as long as it lives."""

Row = dict[str, "str | float | None"]
ROW: dict[str, object] = {
    "phase": str,
    "epoch": int,
    "lr": float,
    **{f"train_{name}": float for name in METRIC_NAMES},
    **{f"validation_{name}": (None, float) for name in METRIC_NAMES},
    "seconds": float,
}
"""The columns of ``metrics.csv`` and the types of their values."""


class RunFolder:
    """Where one run writes; see the methods for the files."""

    def __init__(self, config: TrainConfig, path: Path | None = None) -> None:
        """Make the folder and its ``config.json``, or go on in that of the same run.

        Args:
            config: the run.
            path: the folder; by default ``DATASET-MODEL-METHOD-SPARSITY-seedSEED-N`` in
                the config's ``output_dir``, with the first free N.

        Raises:
            FisherpruneError: where the folder is of another run, or of a finished one,
                or can't be made.
        """
        if path is None:
            check_writable(Path(config.output_dir))
            path = _make_first_free(Path(config.output_dir), run_name(config))
        else:
            check_writable(path, "folder")
        self.path = path
        self.rows: list[Row] = []
        self._loggers: list[Logger] = []
        self._opened = ExitStack()
        try:
            # on a file system without locks, the run goes on without one
            self._opened.enter_context(held(path / LOCK, needed=False))
            _check_free(path, config)
            _remove_temporary(path)
            for name in config.loggers:
                logger = LOGGERS[name](path, asdict(config))
                self._opened.callback(logger.close)
                self._loggers.append(logger)
            if not (path / CONFIG).exists():
                self.write_json(CONFIG, asdict(config))
        except Held as error:
            raise FisherpruneError(
                f"folder must be of a run that no other process does, got {path}: "
                f"{error} does it"
            ) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def diverged(self) -> str:
        """What to say after a run whose numbers are not finite any more."""
        return f"a smaller --lr may help; what was written until now is in {self.path}"

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON file; its numbers must be finite."""
        text = json.dumps(content, indent=2, allow_nan=False)
        write_text(self.path / name, f"{text}\n")

    def add_epoch(
        self,
        *,
        train: Metrics,
        validation: Metrics | None,
        seconds: float,
        **columns: str | float,
    ) -> None:
        """Add a row to ``metrics.csv``, which is written anew.

        The columns of a validation that was left out are empty.
        """
        row: Row = dict(columns)
        for part, metrics in (("train", train), ("validation", validation)):
            for name in METRIC_NAMES:
                value = None if metrics is None else getattr(metrics, name)
                row[f"{part}_{name}"] = value
        row["seconds"] = round(seconds, 3)
        self.rows.append(row)
        self._write_rows()
        for logger in self._loggers:
            logger.add(len(self.rows), row)

    def restore_rows(self, rows: list[Row]) -> None:
        """Go on after the rows of a checkpoint; others are forgotten."""
        self.rows = rows
        if rows:
            self._write_rows()
        for logger in self._loggers:
            logger.replay(rows)

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path / METRICS, text.getvalue())

    def save_masks(self, masks: Masks) -> None:
        """Write ``masks.safetensors``, for ``fisherprune.Masks.load``."""
        masks.save(self.path / MASKS)

    def save_weights(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Write a state dict as ``NAME.safetensors``; return the file's SHA-256."""
        data = save({k: v.detach().contiguous() for k, v in state.items()})
        write_bytes(self.path / f"{name}.safetensors", data)
        return hashlib.sha256(data).hexdigest()

    def load_weights(self, name: str, sha256: str | None) -> dict[str, Tensor]:
        """Read what ``save_weights`` wrote.

        Args:
            name: as it was saved.
            sha256: what ``save_weights`` returned.

        Raises:
            FisherpruneError: where the file is missing, damaged or another.
        """
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise _no_weights(path, "is no file" if path.exists() else "is missing")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _no_weights(path, "is not as the run wrote it")
        return load(data)

    def close(self) -> None:
        """End all writing; leave the folder to other processes."""
        self._opened.close()


class FollowedFolder(RunFolder):
    """The folder of a run for ranks but the first: they write and read nothing."""

    def __init__(self, path: Path) -> None:
        """Know where the first rank writes."""
        self.path = path
        self.rows: list[Row] = []
        self._loggers, self._opened = [], ExitStack()

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write nothing."""

    def _write_rows(self) -> None:
        """Write nothing."""

    def save_masks(self, masks: Masks) -> None:
        """Write nothing."""

    def save_weights(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Write nothing; the first rank has the hash."""
        return ""

    def load_weights(self, name: str, sha256: str | None) -> dict[str, Tensor]:
        """Read nothing; the first rank tests."""
        return {}


def _no_weights(path: Path, reason: str) -> FisherpruneError:
    return FisherpruneError(
        f"weights of the run must be in {path}, which {reason}; the run can't be "
        "resumed, start it anew in another folder"
    )


def run_name(config: TrainConfig) -> str:
    """Return ``DATASET-MODEL-METHOD-SPARSITY-seedSEED``."""
    model = re.sub(r"[^\w.-]+", "-", config.model)  # FILE.py:FUNCTION may hold slashes
    return (
        f"{config.dataset}-{model}-{config.method}-{config.sparsity}-seed{config.seed}"
    )


def read_config(folder: Path) -> TrainConfig:
    """Return the configuration of the run in ``folder``.

    Raises:
        FisherpruneError: where there is none, or the file can't be understood.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FisherpruneError(
            f"a run's folder must hold {CONFIG}, but {path} is missing"
        )
    return as_config(read_fields(path))


def _check_free(path: Path, config: TrainConfig) -> None:
    """Check that a folder is new, or of the same run and unfinished."""
    if (path / CONFIG).exists():
        _check_same(path, config)
    elif found := [name for name in FILES if (path / name).exists()]:
        raise FisherpruneError(
            f"folder must be new or that of a run, got {path}, which holds {found[0]} "
            f"but no {CONFIG}"
        )
    if (path / RESULTS).exists():
        done = read_run(path / RESULTS, path.name)
        if identity(done.config) == identity(config):
            tidy(path)  # the process was killed just before it did
        raise FisherpruneError(
            f"folder must be of an unfinished run, got {path}, which holds {RESULTS}"
        )


def tidy(path: Path) -> None:
    """Delete what a finished run no longer needs, and what a killed process left."""
    (path / CHECKPOINT).unlink(missing_ok=True)
    _remove_temporary(path)
    sweep(path)


def _check_same(path: Path, config: TrainConfig) -> None:
    theirs = read_config(path)
    if identity(theirs) == identity(config):
        return
    here, there = distinct(config), distinct(theirs)
    other = [k for k in {**here, **there} if here.get(k) != there.get(k)]
    raise FisherpruneError(
        f"folder must be new or that of the same run, got {path}, whose run differs in "
        f"{', '.join(other)}"
    )


def _remove_temporary(path: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for name in (*FILES, ERROR):
        for left in path.glob(f".{name}.*"):
            left.unlink(missing_ok=True)


def _make_first_free(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()  # fails where it exists: no two runs get the same folder
            return path
        except FileExistsError:
            number += 1
