"""The metrics of a run as TensorBoard shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherprune.packages import required

Row = Mapping[str, Any]


def require_tensorboard() -> type:
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


class Curves:
    """Event files with a point per metric and epoch; warm-up epochs count.

    The point of ``train_loss`` is in the chart ``loss/train``, and so on.
    """

    def __init__(self, path: Path) -> None:
        """Write into ``path``, whose own event files are deleted."""
        self.path = path
        self._begin()

    def add(self, step: int, row: Row, when: float | None = None) -> None:
        """Add the points of an epoch, measured at the time ``when``, or now."""
        for name, value in row.items():
            if isinstance(value, float):
                part, _, metric = name.partition("_")
                tag = f"{metric}/{part}" if metric else name
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
        self._writer = require_tensorboard()(self.path)
