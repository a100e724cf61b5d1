"""The folder of a run: made for it alone, every file whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fisherprune.config import TrainConfig
from fisherprune.errors import FisherpruneError
from fisherprune.files import write_bytes, write_text
from fisherprune.masks import Masks
from fisherprune.metrics import Metrics


def check_writable(output_dir: Path) -> None:
    """Make ``output_dir`` and try a file in it.

    Raises:
        FisherpruneError: where that fails.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise FisherpruneError(
            f"output_dir must be a folder that can be written to, got {output_dir}: "
            f"{error.strerror}"
        ) from error


class RunFolder:
    """Where one run writes; see the methods for the files."""

    def __init__(self, config: TrainConfig) -> None:
        """Make ``DATASET-MODEL-METHOD-SPARSITY-seedSEED-N`` with the first free N.

        ``config.json`` is written at once.
        """
        name = (
            f"{config.dataset}-{config.model}-{config.method}-{config.sparsity}"
            f"-seed{config.seed}"
        )
        self.path = _make_first_free(Path(config.output_dir), name)
        self._rows: list[dict[str, object]] = []
        self.write_json("config.json", asdict(config))

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def add_epoch(
        self, *, train: Metrics, validation: Metrics, **columns: object
    ) -> None:
        """Add a row to ``metrics.csv``, which is written anew."""
        row = dict(columns)
        for part, metrics in (("train", train), ("validation", validation)):
            row |= {f"{part}_{key}": value for key, value in asdict(metrics).items()}
        self._rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path / "metrics.csv", text.getvalue())

    def save_masks(self, masks: Masks) -> None:
        """Write ``masks.safetensors``, for ``fisherprune.Masks.load``."""
        masks.save(self.path / "masks.safetensors")

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Write the model's state as ``NAME.safetensors``."""
        state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        write_bytes(self.path / f"{name}.safetensors", save(state))

    def load_weights(self, name: str) -> dict[str, Tensor]:
        """Read what ``save_weights`` wrote."""
        return load_file(self.path / f"{name}.safetensors")


def _make_first_free(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()  # fails where it exists: no two runs get the same folder
            return path
        except FileExistsError:
            number += 1


def environment(device: torch.device) -> dict[str, object]:
    """Return what a reader needs beside a number: versions, commit, device."""
    cuda = device.type == "cuda"
    try:
        package = version("fisherprune")
    except PackageNotFoundError:  # run from a source folder
        package = None
    return {
        "fisherprune": package,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _commit() -> str | None:
    """Return the commit of the source folder the package runs from, if it is one."""
    source = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != source:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
