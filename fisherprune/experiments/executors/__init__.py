"""Where the runs of a study are executed."""

from __future__ import annotations

from typing import Protocol

from fisherprune.experiments.execute import Outcome
from fisherprune.experiments.store import StudyRun


class Executor(Protocol):
    """Does the runs that are submitted, each under its lock."""

    def free(self) -> bool:
        """Return whether another run can be submitted."""

    def running(self) -> list[StudyRun]:
        """Return the runs that are submitted and have not ended."""

    def submit(self, run: StudyRun) -> None:
        """Begin a run, or do it; ``wait`` returns its outcome."""

    def wait(self) -> list[tuple[StudyRun, Outcome]]:
        """Return what ended since the last call; waits a while where runs go on."""

    def close(self) -> None:
        """Cancel what is running."""
