"""Runs from disk: found by their files; finished, failed, unfinished or broken."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.store import FORMAT as FOLDER_FORMAT
from fisherprune.experiments.store import MARK
from fisherprune.report.printable import one_line
from fisherprune.runs.folder import CONFIG, ERROR, METRICS, RESULTS
from fisherprune.runs.identity import identity
from fisherprune.runs.kinds import TEXT
from fisherprune.runs.reader import FinishedRun, check_format, read_epochs, read_run
from fisherprune.runs.section import as_config, read_fields

RUN_FILES = (RESULTS, ERROR, CONFIG)
"""A folder with one of them is a run's; the first that is there says its state."""


@dataclass(frozen=True)
class Remark:
    """What is to be said about a folder or file, in one printable line each."""

    name: str
    text: str

    def __post_init__(self) -> None:
        for field_name in ("name", "text"):
            object.__setattr__(self, field_name, one_line(getattr(self, field_name)))

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass
class FoundRuns:
    """All runs that were found, by their state."""

    finished: list[FinishedRun] = field(default_factory=list)
    """Each once."""
    failed: list[Remark] = field(default_factory=list)
    unfinished: list[Remark] = field(default_factory=list)
    repeated: list[Remark] = field(default_factory=list)
    """Finished runs of an identity that is in ``finished`` already: not counted."""
    problems: list[Remark] = field(default_factory=list)
    """Files that are truncated, foreign or of another version."""


def load(paths: Sequence[str | os.PathLike]) -> FoundRuns:
    """Read the runs in and below the given folders.

    Args:
        paths: results folders, folders with runs anywhere below them, single runs'
            folders, or ``results.json`` files. Symbolic links are followed.

    Raises:
        FisherpruneError: where a path is missing, holds no runs, is a results folder
            of another version, or is a single run whose result is broken.
    """
    found, seen, runs = FoundRuns(), set[str](), 0
    roots = [_folder(Path(path)) for path in paths]
    for root in roots:
        prefix = f"{_name(root)}/" if len(roots) > 1 else ""
        for folder, name in _run_folders(root, seen, found.problems):
            runs += 1
            shown_as = one_line(f"{prefix}{name}")
            _add(found, folder, shown_as, strict=folder == root)
    if not runs and not found.problems:
        shown = ", ".join(map(str, paths))
        raise FisherpruneError(f"no runs in {shown}: no {' or '.join(RUN_FILES)} there")
    _count_each_once(found)
    return found


def _folder(path: Path) -> Path:
    """Return the folder that a given path means."""
    if not path.exists():
        raise FisherpruneError(f"results must be a folder that exists, got {path}")
    if path.is_dir():
        return path
    if path.name != RESULTS:
        raise FisherpruneError(
            f"results must be a folder or a results.json, got {path}"
        )
    return path.parent


def _name(folder: Path) -> str:
    return os.path.basename(os.path.realpath(folder))


def _run_folders(
    root: Path, seen: set[str], problems: list[Remark]
) -> Iterator[tuple[Path, str]]:
    """Yield the run folders in and below a folder, and what to call them.

    ``seen`` holds the folders that were visited: each is visited once, however many
    paths and links lead to it.
    """
    if (root / MARK).exists():
        check_format(read_fields(root / MARK), FOLDER_FORMAT)

    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, root)
        problems.append(Remark(where, f"can't be read: {error.strerror}"))

    for where, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        if (place := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(where, name)), name))
        if any(name in files for name in RUN_FILES):
            folder = Path(where)
            below = folder.relative_to(root).as_posix()
            yield folder, _name(root) if folder == root else below


def _add(found: FoundRuns, folder: Path, name: str, *, strict: bool) -> None:
    """Read a run folder; ``strict`` raises what else becomes a problem."""
    try:
        _read(found, folder, name)
    except (FisherpruneError, OSError) as error:
        if strict:
            raise
        found.problems.append(problem_of(folder, name, error))


def problem_of(folder: Path, name: str, error: Exception) -> Remark:
    """Return a problem; it names files as seen from the run's folder."""
    text = str(error)
    for path in (str(folder), repr(str(folder))[1:-1]):
        text = text.replace(f"{path}{os.sep}", "")
    return Remark(name, text)


def _read(found: FoundRuns, folder: Path, name: str) -> None:
    if (folder / RESULTS).exists():
        run = read_run(folder / RESULTS, name)
        found.finished.append(run)
        if (metrics := folder / METRICS).exists():
            epochs = read_epochs(metrics, run.config.epochs)
            found.finished[-1] = replace(run, epochs=epochs)
    elif (folder / ERROR).exists():
        error = read_fields(folder / ERROR)
        found.failed.append(Remark(name, error.get("error", TEXT)))
    else:
        config = as_config(read_fields(folder / CONFIG))
        found.unfinished.append(Remark(name, f"{config.epochs} epochs were planned"))


def _count_each_once(found: FoundRuns) -> None:
    """Move runs that repeat another: equal seeds are no independent samples."""
    first: dict[str, FinishedRun] = {}
    for run in found.finished:
        key = identity(run.config)
        if key in first:
            found.repeated.append(
                Remark(run.name, f"is the same run as {first[key].name}")
            )
        else:
            first[key] = run
    found.finished = list(first.values())
