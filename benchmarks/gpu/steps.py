"""Steps with a time budget, and the record that they fill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import NotHere

Record = dict[str, Any]


class Unusable(Exception):
    """The kernels can't be measured as they are; one line per fault."""


class Failed(Exception):
    """A step's command failed, after it had ``found`` something or not."""

    def __init__(self, outcome: Outcome, found: Record | None = None):
        super().__init__(outcome.ending)
        self.tail = outcome.tail
        self.found = found or {}


@dataclass(frozen=True)
class Step:
    """A step of the run: ``run(seconds)`` returns what it adds to the record."""

    part: str
    name: str
    seconds: float
    what: str
    run: Callable[[float], Record]


class Budget:
    """The time of the whole run, in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        """Return the seconds left, never below 0."""
        return max(0.0, self.end - self.clock())

    def grant(self, steps: Sequence[Step]) -> float | None:
        """Return the seconds of the first of ``steps``; None where it does not fit.

        It gets its own and what the following ones do not need.
        """
        own, later = steps[0].seconds, sum(step.seconds for step in steps[1:])
        left = self.left()
        return max(own, left - later) if own <= left else None


def run(
    steps: Sequence[Step],
    budget: Budget,
    record: Record,
    write: Callable[[Record], None],
) -> None:
    """Run the steps one after the other and write the record after each.

    Raises:
        Unusable: from the build check.
    """
    for i, step in enumerate(steps):
        seconds = budget.grant(steps[i:])
        if seconds is None:
            why = f"needs {step.seconds:g} s, {budget.left():.0f} s are left"
            record["not_run"][step.name] = why
        else:
            print(f"{step.part}: {step.name}, at most {seconds:.0f} s", flush=True)
            run_step(step, seconds, record)
        write(record)


def run_step(step: Step, seconds: float, record: Record) -> None:
    """Run one step and add what it found, or why there is nothing."""
    start = time.monotonic()
    try:
        add(record, step.run(seconds))
    except Unusable:
        raise
    except NotHere as reason:
        record["not_run"][step.name] = str(reason)
    except Failed as error:
        add(record, error.found)
        record["failed"][step.name] = {"why": str(error), "tail": error.tail}
    except Exception as error:
        record["failed"][step.name] = {"why": repr(error), "tail": []}
    record["seconds"][step.name] = round(time.monotonic() - start, 1)


def add(record: Record, found: Record) -> None:
    """Add what a step found to the record."""
    for key, value in found.items():
        if isinstance(value, list):
            record[key] += value
        else:
            record[key] |= value


def new_record(place: Record) -> Record:
    """Return a record that holds nothing yet."""
    groups = ("ceilings", "build", "tests", "sanitizer", "not_run", "failed", "seconds")
    record: Record = {"benchmark": "gpu", "environment": place, "rows": []}
    return record | {group: {} for group in groups}


def failures(record: Record) -> list[str]:
    """Return the names of what failed."""
    names = list(record["failed"])
    if not record["tests"].get("ok", True):
        names.append("tests")
    return names + [t for t, result in record["sanitizer"].items() if not result["ok"]]
