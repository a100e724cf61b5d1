"""Runs from disk: found by their files; finished, failed, unfinished or broken."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.store import ERROR, MARK
from fisherprune.experiments.store import FORMAT as FOLDER_FORMAT
from fisherprune.runs.folder import CONFIG, METRICS, RESULTS
from fisherprune.runs.identity import identity
from fisherprune.runs.kinds import TEXT
from fisherprune.runs.reader import (
    Run,
    check_format,
    read_epochs,
    read_run,
)
from fisherprune.runs.section import as_config, read_fields

RUN_FILES = (RESULTS, ERROR, CONFIG)
"""A folder with one of them is a run's; the first that is there says its state."""


@dataclass(frozen=True)
class Remark:
    """What is to be said about a folder or file."""

    name: str
    text: str


@dataclass
class Study:
    """All that was found."""

    runs: list[Run] = field(default_factory=list)
    """Finished, each once."""
    failed: list[Remark] = field(default_factory=list)
    unfinished: list[Remark] = field(default_factory=list)
    repeated: list[Remark] = field(default_factory=list)
    """Finished runs of an identity that is in ``runs`` already: not counted."""
    problems: list[Remark] = field(default_factory=list)
    """Files that are truncated, foreign or of another version."""


def load(paths: Sequence[str | os.PathLike]) -> Study:
    """Read the runs in and below the given folders.

    Args:
        paths: results folders, folders with runs anywhere below them, single runs'
            folders, or ``results.json`` files.

    Raises:
        FisherpruneError: where a path is missing, holds no runs, is a results folder
            of another version, or is a single run whose result is broken.
    """
    study, seen = Study(), set()
    roots = [Path(path) for path in paths]
    for root in roots:
        prefix = f"{root.resolve().name}/" if len(roots) > 1 else ""
        for folder, name in _folders(root, study):
            if (place := folder.resolve()) not in seen:
                seen.add(place)
                _add(study, folder, f"{prefix}{name}", strict=folder == _single(root))
    if not seen and not study.problems:
        shown = ", ".join(map(str, roots))
        raise FisherpruneError(f"no runs in {shown}: no {' or '.join(RUN_FILES)} there")
    _count_each_once(study)
    return study


def _single(root: Path) -> Path:
    """Return the run's folder that a path means if it means one run."""
    return root if root.is_dir() else root.parent


def _folders(root: Path, study: Study) -> Iterator[tuple[Path, str]]:
    """Yield the run folders of a given path, and what to call them."""
    if not root.exists():
        raise FisherpruneError(f"results must be a folder that exists, got {root}")
    if not root.is_dir():
        if root.name != RESULTS:
            raise FisherpruneError(
                f"results must be a folder or a results.json, got {root}"
            )
        yield root.parent, root.parent.resolve().name
        return
    if (root / MARK).exists():
        check_format(read_fields(root / MARK), FOLDER_FORMAT)

    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, root)
        study.problems.append(Remark(where, f"can't be read: {error.strerror}"))

    for where, folders, files in os.walk(root, onerror=unreadable):
        folders.sort()
        if any(name in files for name in RUN_FILES):
            name = Path(where).relative_to(root).as_posix()
            yield Path(where), root.resolve().name if name == "." else name


def _add(study: Study, folder: Path, name: str, *, strict: bool) -> None:
    """Read a run folder; ``strict`` raises what else becomes a problem."""
    try:
        _read(study, folder, name)
    except FisherpruneError as error:
        if strict:
            raise
        study.problems.append(Remark(name, _without(folder, str(error))))


def _without(folder: Path, text: str) -> str:
    """Name files as seen from the run's folder, which stands before the text."""
    return text.replace(f"{folder}{os.sep}", "")


def _read(study: Study, folder: Path, name: str) -> None:
    if (folder / RESULTS).exists():
        study.runs.append(read_run(folder / RESULTS, name))
        if (metrics := folder / METRICS).exists():
            study.runs[-1] = replace(study.runs[-1], epochs=read_epochs(metrics))
    elif (folder / ERROR).exists():
        error = read_fields(folder / ERROR)
        text = error.get("error", TEXT)
        study.failed.append(Remark(name, " ".join(text.split())))
    else:
        config = as_config(read_fields(folder / CONFIG))
        study.unfinished.append(Remark(name, f"{config.epochs} epochs asked for"))


def _count_each_once(study: Study) -> None:
    """Move runs that repeat another: equal seeds are no independent samples."""
    first: dict[str, Run] = {}
    for run in study.runs:
        key = identity(run.config)
        if key in first:
            study.repeated.append(Remark(run.name, f"repeats {first[key].name}"))
        else:
            first[key] = run
    study.runs = list(first.values())
