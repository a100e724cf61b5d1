"""What a logger is, and what it shows of an epoch."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fisherprune.files import write_text

Row = Mapping[str, Any]
"""Of ``metrics.csv``; also the whole numbers that say which epoch it is."""

PROJECT = "fisherprune"
"""Where services keep the runs, but where their environment says another."""


class Logger(Protocol):
    """Shows a point for each metric and epoch; warm-up epochs count."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        """Begin, or go on with the run of the folder.

        Raises:
            FisherpruneError: where it can't.
        """

    @staticmethod
    def require() -> Any:
        """Return the package that is needed.

        Raises:
            FisherpruneError: where it is not installed.
        """

    def add(self, step: int, row: Row) -> None:
        """Add the points of an epoch, from 1."""

    def replay(self, rows: Sequence[Row]) -> None:
        """Go on after the epochs of a checkpoint: all are there, none twice."""

    def close(self) -> None:
        """End writing."""


def points(row: Row) -> dict[str, float]:
    """Return the values of a row by their charts: ``train_loss`` in ``loss/train``."""
    found = {}
    for name, value in row.items():
        if isinstance(value, float):
            part, _, metric = name.partition("_")
            found[f"{metric}/{part}" if metric else name] = value
    return found


def run_id(path: Path) -> str:
    """Return what a service calls the run: random, kept in a file of its folder."""
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text()
