"""How long the phases of a run take."""

from __future__ import annotations

import time


class Clock:
    """Wall time of the phases of a run, in seconds."""

    def __init__(self) -> None:
        """Start."""
        phases = ("data", "warmup", "scoring", "training", "testing")
        self.laps: dict[str, float] = dict.fromkeys(phases, 0.0)
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap to the phase ``name``."""
        now = time.perf_counter()
        self.laps[name] += now - self._last
        self._last = now
