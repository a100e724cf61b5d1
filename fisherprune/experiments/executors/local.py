"""Runs done one after the other in this process."""

from __future__ import annotations

from fisherprune.experiments.execute import Options, Outcome, attempt
from fisherprune.experiments.store import StudyRun


class Local:
    """An ``Executor`` that does a run when it is submitted."""

    def __init__(self, options: Options) -> None:
        """Do all runs with the same options."""
        self.options = options
        self._ended: list[tuple[StudyRun, Outcome]] = []

    def free(self) -> bool:
        """Return whether the last outcome was asked for."""
        return not self._ended

    def running(self) -> list[StudyRun]:
        """Return an empty list: a run that is submitted has ended."""
        return []

    def submit(self, run: StudyRun) -> None:
        """Do a run."""
        self._ended.append((run, attempt(run, self.options)))

    def wait(self) -> list[tuple[StudyRun, Outcome]]:
        """Return what ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Do nothing."""
