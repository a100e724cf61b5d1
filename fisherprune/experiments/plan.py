"""From paths to runs: files are read once, folders are looked into again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.published import read_published
from fisherprune.experiments.shard import ALL, Shard
from fisherprune.experiments.store import StudyRun, check_folder
from fisherprune.experiments.study import read_study
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.device import resolve_device

SUFFIXES = (".json", ".toml")


@dataclass(frozen=True)
class Overrides:
    """What the command line sets for all runs; None leaves it as it is."""

    output: Path | None = None
    device: str | None = None
    data_dir: str | None = None
    processes: int | None = None


class Plan:
    """The runs of some files and folders, in order, each once."""

    def __init__(
        self, paths: Iterable[Path], overrides: Overrides, shard: Shard = ALL
    ) -> None:
        """Read everything.

        Raises:
            FisherpruneError: with a line for each file that is wrong, and for paths
                where there is nothing.
        """
        self.paths, self.overrides, self.shard = list(paths), overrides, shard
        self._read: dict[Path, tuple[object, list[StudyRun] | str]] = {}
        self.problems: dict[Path, str] = {}
        self.runs: list[StudyRun] = []
        files = self._files(strict=True)
        self._update(files)
        if self.problems:
            raise FisherpruneError("\n".join(self.problems.values()))

    def refresh(self) -> list[str]:
        """Look into the folders again; return what is newly wrong.

        Runs of files that are gone are left out, files that can't be read are in
        ``problems`` until they can.
        """
        before = set(self.problems.values())
        self._update(self._files(strict=False))
        return [text for text in self.problems.values() if text not in before]

    def count(self) -> str:
        """Return how many runs there are, in words."""
        part = "" if self.shard == ALL else f" of shard {self.shard}"
        return f"{len(self.runs)} runs{part}"

    def _files(self, strict: bool) -> list[Path]:
        """Return all files, in order."""
        files = []
        for path in self.paths:
            found = [path]
            if path.is_dir():
                inside = sorted(path.glob("*"))
                found = [p for p in inside if p.suffix in SUFFIXES and p.is_file()]
            if strict:
                _check_path(path, found)
            files += found
        return list(dict.fromkeys(files))

    def _update(self, files: list[Path]) -> None:
        self.problems = {}
        runs: dict[object, StudyRun] = {}
        for file in files:
            content = self._runs_of(file)
            if isinstance(content, str):
                self.problems[file] = content
                continue
            for run in content:
                runs.setdefault(run.key, run)
        self.runs = list(runs.values())

    def _runs_of(self, file: Path) -> list[StudyRun] | str:
        """Return the runs of a file, or what is wrong with it."""
        stamp = _stamp(file)
        known, content = self._read.get(file, (None, None))
        given = file in self.paths  # not found in a folder: read once
        if content is None or (stamp != known and not given):
            try:
                content = self._load(file)
            except FisherpruneError as error:
                content = str(error)
            self._read[file] = (stamp, content)
        return content

    def _load(self, file: Path) -> list[StudyRun]:
        if file.suffix == ".json":
            configs = [read_published(file)]
            results = Path(configs[0].output_dir)
        else:
            study = read_study(file)
            configs, results = list(study.runs), Path("results") / study.name
        results = self.overrides.output or results
        check_folder(results)
        runs = [StudyRun(self._overridden(c, file, results), results) for c in configs]
        return [run for run in runs if self.shard.takes(run.identity)]

    def _overridden(
        self, config: TrainConfig, file: Path, results: Path
    ) -> TrainConfig:
        names = ("device", "data_dir", "processes")
        given = {name: getattr(self.overrides, name) for name in names}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        try:
            config = replace(config, output_dir=str(results), **changes)
            resolve_device(config.device)
        except FisherpruneError as error:
            raise FisherpruneError(f"{file}: {error}") from None
        return config


def _check_path(path: Path, found: list[Path]) -> None:
    if not path.exists():
        raise FisherpruneError(f"{path}: no such file or folder")
    if not found:
        raise FisherpruneError(f"{path}: holds no .json or .toml file")
    if not path.is_dir() and path.suffix not in SUFFIXES:
        raise FisherpruneError(
            f"{path}: must be a .toml study, a .json file of the published code, or a "
            "folder of those"
        )


def _stamp(file: Path) -> object:
    """Return what changes when a file does."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
