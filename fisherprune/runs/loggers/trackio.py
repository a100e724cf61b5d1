"""The metrics of a run in Trackio."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any

from fisherprune.packages import required
from fisherprune.runs.loggers.logger import PROJECT, Row, points, run_id


class Trackio:
    """A run of project ``TRACKIO_PROJECT`` or ``fisherprune``; the rest its own way.

    As ``TRACKIO_DIR``, the local folder it writes to, or ``TRACKIO_SPACE_ID``.
    """

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        """Begin, or go on with the run whose id the folder has."""
        package = self.require()
        with _on_stderr():
            self._run = Context().run(  # whatever run the calling program has goes on
                package.init,
                os.environ.get("TRACKIO_PROJECT", PROJECT),
                f"{folder.name}-{run_id(folder / 'trackio.id')}",
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._next = self._run._next_step

    @staticmethod
    def require() -> Any:
        """Return the package.

        Raises:
            FisherpruneError: where it is not installed.
        """
        return required(
            "trackio",
            "log: trackio must be installed",
            "pip install trackio, or leave it out",
        )

    def add(self, step: int, row: Row) -> None:
        """Add the points of an epoch, if Trackio does not have them."""
        if step >= self._next:
            self._run.log(points(row), step=step)

    def replay(self, rows: Sequence[Row]) -> None:
        """Add the epochs of a checkpoint that Trackio does not have yet."""
        for step, row in enumerate(rows, 1):
            self.add(step, row)

    def close(self) -> None:
        """Wait until all is written."""
        with _on_stderr():
            self._run.finish()


def _on_stderr() -> contextlib.redirect_stdout:
    """Move what Trackio prints away from the results, which alone go to stdout."""
    return contextlib.redirect_stdout(sys.stderr)
