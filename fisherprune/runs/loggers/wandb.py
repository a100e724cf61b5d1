"""The metrics of a run in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherprune.errors import FisherpruneError
from fisherprune.packages import required
from fisherprune.runs.loggers.logger import PROJECT, Row, points, run_id


class WandB:
    """A run of project ``WANDB_PROJECT`` or ``fisherprune``; the rest wandb's own way.

    As ``WANDB_MODE=offline``, which writes into the run's folder and asks no server. A
    run that is resumed goes on under the same id. Offline, each part of it is a folder
    that holds all epochs until then, so that the last is the one to be sent.
    """

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        """Begin, or go on with the run whose id the folder has."""
        wandb = self.require()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=run_id(folder / "wandb.id"),
                resume="allow",
                dir=folder,
                config=dict(config),
                reinit="create_new",  # whatever run the calling program has
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise FisherpruneError(
                f"log: wandb must be able to begin a run, but {error}; log in with "
                "'wandb login', or set WANDB_MODE=offline"
            ) from error

    @staticmethod
    def require() -> Any:
        """Return the package.

        Raises:
            FisherpruneError: where it is not installed.
        """
        return required(
            "wandb",
            "log: wandb must be installed",
            "pip install wandb, or leave it out",
        )

    def add(self, step: int, row: Row) -> None:
        """Add the points of an epoch; wandb takes none of an earlier one."""
        if step >= self._run.step:
            self._run.log(points(row), step=step)

    def replay(self, rows: Sequence[Row]) -> None:
        """Add the epochs of a checkpoint that wandb does not have yet."""
        for step, row in enumerate(rows, 1):
            self.add(step, row)

    def close(self) -> None:
        """Wait until all is sent or written."""
        self._run.finish()
