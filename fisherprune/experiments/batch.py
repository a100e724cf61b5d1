"""All runs of some paths: what is done next, and what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import store
from fisherprune.experiments.estimate import seconds_needed
from fisherprune.experiments.execute import End, Outcome
from fisherprune.experiments.executors import Executor
from fisherprune.experiments.plan import Plan
from fisherprune.experiments.store import StudyRun
from fisherprune.files import read_json
from fisherprune.runs import locks
from fisherprune.runs.folder import ERROR
from fisherprune.runs.words import duration

SUMMARY = {
    End.FINISHED: "finished",
    End.SKIPPED: "finished before, or by another process",
    End.FAILED: "failed; the same command tries them again",
    End.LEFT: "left undone",
}
Key = tuple[Path, str]


class Batch:
    """Does the runs of a plan in their order, as far as time and others allow."""

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        *,
        max_minutes: float = math.inf,
        say: Callable[[str], None] = print,
    ) -> None:
        """Prepare; ``say`` gets a line for everything that happens."""
        self.plan, self.executor, self.say = plan, executor, say
        self.limit = 60 * max_minutes
        self.start = time.monotonic()
        self.outcomes: dict[Key, Outcome] = {}
        self._failures: dict[Key, bytes | None] = {}
        self._waiting: set[Key] = set()
        self._told: set[Key] = set()

    def run(self) -> int:
        """Do the runs; return 0, 1 where one failed or is left, 130 after Ctrl-C."""
        try:
            while self._step():
                pass
            for folder in {run.locks for run in self.plan.runs}:
                locks.sweep(folder)
        except KeyboardInterrupt:
            self.say("interrupted; the same command goes on with the last epoch done")
            return 130
        finally:
            self.executor.close()
        ends = self.counts()
        whole = not (ends[End.FAILED] or ends[End.LEFT] or self.plan.problems)
        return 0 if whole else 1

    def counts(self) -> Counter[End]:
        """Return how many runs ended in which way; those without an end are left."""
        return Counter(self._outcome(run).end for run in self.plan.runs)

    def _outcome(self, run: StudyRun) -> Outcome:
        return self.outcomes.get(run.key, Outcome(End.LEFT, "not started"))

    def _step(self) -> bool:
        """Start what can be started and wait for an end; False where all is done."""
        for problem in self.plan.refresh():
            self.say(f"left out: {problem}")
        self._start_some()
        ended = self.executor.wait()
        for run, outcome in ended:
            self._end(run, outcome)
        if ended or self.executor.running():
            return True
        return bool(self._waiting) and self._wait()

    def _start_some(self) -> None:
        running = {run.key for run in self.executor.running()}
        for run in self.plan.runs:
            self._failures.setdefault(run.key, store.failure(run))
        for run in self.plan.runs:
            if not self.executor.free():
                return
            if run.key in self.outcomes or run.key in running | self._waiting:
                continue
            if self._can_start(run):
                self._say(run, "")
                self.executor.submit(run)

    def _say(self, run: StudyRun, text: str) -> None:
        keys = [other.key for other in self.plan.runs]
        number = keys.index(run.key) + 1 if run.key in keys else "-"  # its file is gone
        self.say(f"[{number}/{len(keys)}] {run.name}{text}")

    def _can_start(self, run: StudyRun) -> bool:
        """Return whether a run is to start now; else it has ended, or waits."""
        try:
            finished = store.state(run) == "finished"
            if finished and not run.lock.exists():
                self.outcomes[run.key] = Outcome(End.SKIPPED)
                return False
            if not finished:  # else its process was killed before it tidied up
                self._check_failure(run)
                store.make_folder(run.results)
                if not self._fits(run):
                    return False
        except (OSError, ValueError) as error:
            self._end(run, Outcome(End.FAILED, store.line(error)))
            return False
        if holder := locks.holder(run.lock):
            self._wait_for(run, holder)
        return holder is None

    def _check_failure(self, run: StudyRun) -> None:
        """Raise the error of a run that failed in another process since we began."""
        if store.failure(run) not in (None, self._failures[run.key]):
            error = read_json(run.folder / ERROR).get("error")
            raise FisherpruneError(f"{error} (in another process)")

    def _fits(self, run: StudyRun) -> bool:
        if self.limit == math.inf:
            return True
        left = self.limit - self._seconds()
        needed = seconds_needed(run) or 0.0
        if 0 < left and needed <= left:
            return True
        why = f"needs about {duration(needed)}, " if needed else ""
        text = f"{why}{duration(max(0.0, left))} are left"
        self._end(run, Outcome(End.LEFT, text))
        return False

    def _wait_for(self, run: StudyRun, holder: str) -> None:
        self._waiting.add(run.key)
        if run.key not in self._told:
            self._told.add(run.key)
            self._say(run, f": {holder} does it")

    def _wait(self) -> bool:
        """Wait for runs that others hold; False where there is no time left."""
        if self._seconds() >= self.limit:
            for run in self.plan.runs:
                if run.key in self._waiting:
                    self._end(run, Outcome(End.LEFT, "another process does it"))
            return False
        time.sleep(locks.POLL)
        self._waiting.clear()
        return True

    def _end(self, run: StudyRun, outcome: Outcome) -> None:
        if outcome.end is End.LOCKED:
            self._waiting.add(run.key)
            return
        self.outcomes[run.key] = outcome
        detail = f", {outcome.text}" if outcome.text else ""
        self._say(run, f": {outcome.end.value}{detail}")

    def summary(self) -> str:
        """Return what came of it, as text."""
        ends = self.counts()
        lines = ["", f"{self.plan.count()} in {duration(self._seconds())}:"]
        for end, words in SUMMARY.items():
            if ends[end]:
                lines.append(f"  {ends[end]:4}  {words}")
                lines += self._reasons(end)
        lines += [f"  left out: {problem}" for problem in self.plan.problems.values()]
        if ends[End.FINISHED] + ends[End.SKIPPED]:
            folders = dict.fromkeys(str(run.results) for run in self.plan.runs)
            lines += ["", *(f"python -m fisherprune.report {f}" for f in folders)]
        return "\n".join(lines)

    def _seconds(self) -> float:
        return time.monotonic() - self.start

    def _reasons(self, end: End) -> list[str]:
        if end not in (End.FAILED, End.LEFT):
            return []
        ends = ((run, self._outcome(run)) for run in self.plan.runs)
        return [f"        {r.name}: {o.text}" for r, o in ends if o.end is end]


def listing(plan: Plan) -> str:
    """Return the runs of a plan, each with its state, as text."""
    lines, counts = [], Counter[str]()
    for run in plan.runs:
        state, detail = _state(run)
        counts[state] += 1
        lines.append(f"{run.name}  {state}{detail}")
    totals = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return "\n".join([*lines, "", f"{plan.count()}: {totals}"])


def _state(run: StudyRun) -> tuple[str, str]:
    """Return a word for what has come of a run, and what is wrong with it."""
    try:
        state = store.state(run)
    except (OSError, ValueError) as error:
        damaged = isinstance(error, FisherpruneError)
        return "damaged" if damaged else "unreadable", f": {store.line(error)}"
    held = state != "finished" and locks.holder(run.lock)
    return "running" if held else state, ""
