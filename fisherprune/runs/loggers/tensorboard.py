"""The metrics of a run as TensorBoard shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fisherprune.packages import required
from fisherprune.runs.loggers.logger import Row, points


class TensorBoard:
    """Event files in the run's folder ``tensorboard``."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        """Delete the event files that are there, and begin."""
        self.path = folder / "tensorboard"
        self._begin()

    @staticmethod
    def require() -> type:
        """Return torch's writer of event files.

        Raises:
            FisherpruneError: where the package ``tensorboard`` is not installed.
        """
        package = required(
            "torch.utils.tensorboard",
            "tensorboard must be installed to write its files",
            "pip install tensorboard, or leave the option out",
        )
        return package.SummaryWriter

    def add(self, step: int, row: Row, when: float | None = None) -> None:
        """Add the points of an epoch, measured at the time ``when``, or now."""
        for tag, value in points(row).items():
            self._writer.add_scalar(tag, value, step, when)
        self._writer.flush()

    def replay(self, rows: Sequence[Row]) -> None:
        """Begin again with the epochs of a checkpoint: none is there twice."""
        self.close()
        self._begin()
        when = time.time() - sum(row["seconds"] for row in rows)
        for step, row in enumerate(rows, 1):
            when += row["seconds"]
            self.add(step, row, when)

    def close(self) -> None:
        """End the files."""
        self._writer.close()

    def _begin(self) -> None:
        for old in self.path.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = self.require()(self.path)
