"""The folder of a run: for it alone, every file whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.files import check_writable, write_bytes, write_text
from fisherprune.masks.masks import Masks
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import distinct, identity
from fisherprune.runs.metrics import METRIC_NAMES, Metrics
from fisherprune.runs.section import as_config, read_fields
from fisherprune.runs.tensorboard import Curves

CONFIG, METRICS, MASKS = "config.json", "metrics.csv", "masks.safetensors"
CHECKPOINT, RESULTS = "checkpoint.pt", "results.json"
WEIGHTS = ("last.safetensors", "best.safetensors")
FILES = (CONFIG, METRICS, MASKS, *WEIGHTS, CHECKPOINT, RESULTS)


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
            _claim(path, config)
        self.path = path
        self.rows: list[dict[str, object]] = []
        self._curves = Curves(path / "tensorboard") if config.tensorboard else None
        if not (path / CONFIG).exists():
            self.write_json(CONFIG, asdict(config))

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def add_epoch(
        self,
        *,
        train: Metrics,
        validation: Metrics | None,
        seconds: float,
        **columns: object,
    ) -> None:
        """Add a row to ``metrics.csv``, which is written anew.

        The columns of a validation that was left out are empty.
        """
        row = dict(columns)
        for part, metrics in (("train", train), ("validation", validation)):
            for name in METRIC_NAMES:
                row[f"{part}_{name}"] = metrics and getattr(metrics, name)
        row["seconds"] = round(seconds, 3)
        self.rows.append(row)
        self._write_rows()
        if self._curves is not None:
            self._curves.add(len(self.rows), row)

    def restore_rows(self, rows: list[dict[str, object]]) -> None:
        """Go on after the rows of a checkpoint; others are forgotten."""
        self.rows = rows
        if rows:
            self._write_rows()
        if self._curves is not None:
            self._curves.replay(rows)

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path / METRICS, text.getvalue())

    def save_masks(self, masks: Masks) -> None:
        """Write ``masks.safetensors``, for ``fisherprune.Masks.load``."""
        masks.save(self.path / MASKS)

    def save_weights(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write the state dict of a model as ``NAME.safetensors``."""
        state = {k: v.detach().contiguous() for k, v in state.items()}
        write_bytes(self.path / f"{name}.safetensors", save(state))

    def load_weights(self, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what ``save_weights`` wrote.

        Args:
            name: as it was saved.
            like: a state dict of the same model.

        Raises:
            FisherpruneError: where the file is missing, damaged or of another model.
        """
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise _no_weights(path, "is no file" if path.exists() else "is missing")
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _no_weights(path, f"can't be read: {error}") from error
        if _kinds(weights) != _kinds(like):
            raise _no_weights(path, "holds weights of another model")
        return weights

    def close(self) -> None:
        """End what is written in the background."""
        if self._curves is not None:
            self._curves.close()


def _no_weights(path: Path, reason: str) -> FisherpruneError:
    return FisherpruneError(
        f"weights of the run must be in {path}, which {reason}; the run can't be "
        "resumed, start it anew in another folder"
    )


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Return what tells the weights of one model from those of another."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def run_name(config: TrainConfig) -> str:
    """Return ``DATASET-MODEL-METHOD-SPARSITY-seedSEED``."""
    return (
        f"{config.dataset}-{config.model}-{config.method}-{config.sparsity}"
        f"-seed{config.seed}"
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


def _claim(path: Path, config: TrainConfig) -> None:
    """Make the folder, or see that it is of the same run and unfinished."""
    check_writable(path, "folder")
    if (path / CONFIG).exists():
        _check_same(path, config)
    elif found := [name for name in FILES if (path / name).exists()]:
        raise FisherpruneError(
            f"folder must be new or that of a run, got {path}, which holds {found[0]} "
            f"but no {CONFIG}"
        )
    if (path / RESULTS).exists():
        (path / CHECKPOINT).unlink(missing_ok=True)  # killed just before it did
        raise FisherpruneError(
            f"folder must be of an unfinished run, got {path}, which holds {RESULTS}"
        )
    _remove_leftovers(path)


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


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for name in FILES:
        for leftover in path.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)


def _make_first_free(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()  # fails where it exists: no two runs get the same folder
            return path
        except FileExistsError:
            number += 1
