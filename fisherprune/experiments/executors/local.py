"""Runs done one after the other in this process."""

from __future__ import annotations

from fisherprune.experiments.execute import Options, Outcome, attempt
from fisherprune.experiments.store import Run


class Local:
    """Executes a run when it is submitted; ``rays.Cluster`` has the same methods."""

    def __init__(self, options: Options) -> None:
        """Do all runs with the same options."""
        self.options = options
        self._ended: list[tuple[Run, Outcome]] = []

    def free(self) -> bool:
        """Return whether another run can be submitted."""
        return not self._ended

    def running(self) -> list[Run]:
        """Return the runs that are submitted and have not ended."""
        return []

    def submit(self, run: Run, generation: int) -> None:
        """Do a run; ``wait`` returns its outcome."""
        self._ended.append((run, attempt(run, generation, self.options)))

    def wait(self) -> list[tuple[Run, Outcome]]:
        """Return what ended since the last call; waits a while where runs go on."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """End; nothing is running."""
