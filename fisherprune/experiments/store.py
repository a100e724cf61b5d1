"""A results folder: where each run is, and in which state it is.

    RESULTS/fisherprune-results.json   which format this is
    RESULTS/runs/NAME-IDENTITY/        a run: see runs.py; error.json where it failed
    RESULTS/statistics/                cached statistics, safe to delete
    RESULTS/locks/                     who does what

Nothing finished is ever overwritten or removed: what is damaged is told, by name.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.files import write_text
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import (
    CHECKPOINT,
    CONFIG,
    ERROR,
    RESULTS,
    WEIGHTS,
    read_config,
    run_name,
)
from fisherprune.runs.folder import tidy as tidy_folder
from fisherprune.runs.identity import identity
from fisherprune.runs.reader import check_format, read_run
from fisherprune.runs.result import RunResult
from fisherprune.runs.section import read_fields

FORMAT = 1
"""Of a results folder."""
MARK = "fisherprune-results.json"
State = Literal["finished", "failed", "resumable", "new"]


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, with a place in a results folder."""

    config: TrainConfig
    results: Path

    @cached_property
    def identity(self) -> str:
        """Which run this is."""
        return identity(self.config)

    @cached_property
    def key(self) -> tuple[Path, str]:
        """What tells runs apart: the same run may be in two results folders."""
        return Path(os.path.realpath(self.results)), self.identity

    @cached_property
    def name(self) -> str:
        """The name of its folder."""
        return f"{run_name(self.config)}-{self.identity}"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.results / "runs" / self.name

    @property
    def locks(self) -> Path:
        """Where the locks of its results folder are."""
        return self.results / "locks"

    @property
    def lock(self) -> Path:
        """What the process that does it holds."""
        return self.locks / f"{self.identity}.lock"


def check_folder(results: Path) -> None:
    """Check that ``results`` is free, or a results folder of this format.

    Raises:
        FisherpruneError: where it is something else, or of another version.
    """
    mark = results / MARK
    try:
        there, marked = results.exists(), mark.exists()
    except OSError as error:
        raise _no_folder(results, error) from None
    if there and not results.is_dir():
        raise FisherpruneError(f"{results}: results go into a folder, this is a file")
    if not marked:
        return
    try:
        check_format(read_fields(mark), FORMAT)
    except FieldError as error:
        raise FisherpruneError(f"{error}; give another folder by --output") from None


def make_folder(results: Path) -> None:
    """Make a results folder where there is none.

    Raises:
        FisherpruneError: where that fails, or ``check_folder`` does.
    """
    check_folder(results)
    try:
        for part in ("runs", "statistics", "locks"):
            (results / part).mkdir(parents=True, exist_ok=True)
        if not (results / MARK).exists():
            write_text(results / MARK, json.dumps({"format": FORMAT}) + "\n")
    except OSError as error:
        raise _no_folder(results, error) from error


def _no_folder(results: Path, error: OSError) -> FisherpruneError:
    return FisherpruneError(
        f"{results}: results must go into a folder that can be written to: "
        f"{error.strerror}"
    )


def read_results(run: StudyRun) -> RunResult | None:
    """Return the result of a run; None where there is none yet.

    Raises:
        FisherpruneError: where the file is damaged, of another run or version.
    """
    path = run.folder / RESULTS
    if not path.exists():
        return None
    try:
        result = read_run(path, run.name)
        _check_identity(f"{path}: config", result.config, run)
    except FisherpruneError as error:
        hint = "move the run's folder away to do the run again"
        raise FisherpruneError(f"{error}; {hint}") from None
    return result


def _check_identity(place: str, stored: TrainConfig, run: StudyRun) -> None:
    """Check that a stored configuration is the run's."""
    if identity(stored) != run.identity:
        got = f"that of {identity(stored)}"
        raise FieldError(place, f"that of run {run.identity}", got)


def state(run: StudyRun) -> State:
    """Return what has come of a run so far.

    Raises:
        FisherpruneError: where the run's folder holds another run, or damaged files.
    """
    if read_results(run) is not None:
        return "finished"
    config = run.folder / CONFIG
    if config.exists():
        _check_identity(f"{config}: config", read_config(run.folder), run)
    if (run.folder / ERROR).exists():
        return "failed"
    return "resumable" if (run.folder / CHECKPOINT).exists() else "new"


def failure(run: StudyRun) -> bytes | None:
    """Return what a failed run left behind, to compare with later."""
    try:
        return (run.folder / ERROR).read_bytes()
    except OSError:
        return None


def write_failure(run: StudyRun, error: BaseException) -> str:
    """Write ``error.json`` for a failed run; return the line that says why."""
    text = line(error)
    content = {
        "error": text,
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / ERROR, json.dumps(content, indent=2) + "\n")
    except OSError as full:
        text += f" (and error.json can't be written: {full.strerror})"
    return text


def line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text = " ".join(str(error).split()) or "no message"
    expected = isinstance(error, FisherpruneError)
    return text if expected else f"{type(error).__name__}: {text}"


def tidy(run: StudyRun, keep_weights: bool) -> None:
    """Remove what a finished run leaves behind, and what its killed attempts left."""
    (run.folder / ERROR).unlink(missing_ok=True)
    for name in () if keep_weights else WEIGHTS:
        (run.folder / name).unlink(missing_ok=True)
    tidy_folder(run.folder)
