"""All runs of some paths: what is done next, and what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import leases as locks
from fisherprune.experiments import store
from fisherprune.experiments.estimate import seconds_needed
from fisherprune.experiments.execute import Outcome
from fisherprune.experiments.plan import Plan
from fisherprune.experiments.store import Run
from fisherprune.files import read_json
from fisherprune.runs.words import duration


class Batch:
    """Does the runs of a plan in their order, as far as time and others allow."""

    def __init__(
        self,
        plan: Plan,
        executor,
        *,
        max_minutes: float = math.inf,
        say: Callable[[str], None] = print,
    ) -> None:
        """Prepare; ``say`` gets a line for everything that happens."""
        self.plan, self.executor, self.say = plan, executor, say
        self.limit = 60 * max_minutes
        self.start = time.monotonic()
        self.outcomes: dict[object, Outcome] = {}
        self.interrupted = False
        self._watches: dict[object, locks.Watch] = {}
        self._failures: dict[object, bytes | None] = {}
        self._waiting: set[object] = set()
        self._told: set[object] = set()

    def run(self) -> int:
        """Do the runs; return 0, 1 where one failed or is left, 130 after Ctrl-C."""
        try:
            while self._step():
                pass
            for folder in {run.locks for run in self.plan.runs}:
                locks.sweep(folder)
        except KeyboardInterrupt:
            self.interrupted = True
            self.say("interrupted; the same command goes on with the last epoch done")
        finally:
            self.executor.close()
        kinds = self.counts()
        whole = not (kinds["failed"] or kinds["left"] or self.plan.problems)
        return 130 if self.interrupted else 0 if whole else 1

    def counts(self) -> Counter:
        """Return how many runs ended in which way; those without an end are left."""
        kinds = Counter(self._outcome(run).kind for run in self.plan.runs)
        return kinds

    def _outcome(self, run: Run) -> Outcome:
        return self.outcomes.get(run.key, Outcome("left", "not started"))

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
            generation = self._startable(run)
            if generation is not None:
                self.say(f"[{self._number(run)}] {run.name}")
                self.executor.submit(run, generation)

    def _number(self, run: Run) -> str:
        keys = [other.key for other in self.plan.runs]
        return f"{keys.index(run.key) + 1}/{len(keys)}"

    def _startable(self, run: Run) -> int | None:
        """Return the generation of the lock to claim for a run that is to start now."""
        watch = self._watches.setdefault(run.key, locks.Watch(run.locks, run.identity))
        try:
            if store.state(run) == "finished":
                return self._finished(run, watch)
            self._check_failure(run)
            store.make_folder(run.results)
        except FisherpruneError as error:
            self._end(run, Outcome("failed", str(error)))
            return None
        if not self._fits(run):
            return None
        generation = watch.next()
        if generation is None:
            self._wait_for(run, watch)
        return generation

    def _finished(self, run: Run, watch: locks.Watch) -> int | None:
        """Skip a run; where its process was killed before it tidied up, let it end."""
        if watch.left():
            return watch.next()
        self.outcomes[run.key] = Outcome("skipped")
        return None

    def _check_failure(self, run: Run) -> None:
        """Raise the error of a run that failed in another process since we began."""
        if store.failure(run) not in (None, self._failures[run.key]):
            error = read_json(run.folder / store.ERROR).get("error")
            raise FisherpruneError(f"{error} (in another process)")

    def _fits(self, run: Run) -> bool:
        if self.limit == math.inf:
            return True
        left = self.limit - (time.monotonic() - self.start)
        needed = seconds_needed(run) or 0.0
        if 0 < left and needed <= left:
            return True
        why = f"needs about {duration(needed)}, " if needed else ""
        outcome = Outcome("left", f"{why}{duration(max(0.0, left))} are left")
        self._end(run, outcome)
        return False

    def _wait_for(self, run: Run, watch: locks.Watch) -> None:
        self._waiting.add(run.key)
        if run.key not in self._told:
            self._told.add(run.key)
            self.say(f"[{self._number(run)}] {run.name}: {watch.holder()} does it")

    def _wait(self) -> bool:
        """Wait for runs that others hold; False where there is no time left."""
        if time.monotonic() - self.start >= self.limit:
            for run in self.plan.runs:
                if run.key in self._waiting:
                    self._end(run, Outcome("left", "another process does it"))
            return False
        time.sleep(locks.POLL)
        self._waiting.clear()
        return True

    def _end(self, run: Run, outcome: Outcome) -> None:
        if outcome.kind == "locked":
            self._waiting.add(run.key)
            return
        self.outcomes[run.key] = outcome
        detail = f", {outcome.text}" if outcome.text else ""
        self.say(f"[{self._number(run)}] {run.name}: {outcome.kind}{detail}")

    def summary(self) -> str:
        """Return what came of it, as text."""
        kinds = self.counts()
        lines = ["", f"{len(self.plan.runs)} runs in {duration(self._seconds())}:"]
        for kind, words in {
            "finished": "finished",
            "skipped": "finished before, or by another process",
            "failed": "failed; the same command tries them again",
            "left": "left undone",
        }.items():
            if kinds[kind]:
                lines.append(f"  {kinds[kind]:4}  {words}")
                lines += self._reasons(kind)
        lines += [f"  left out: {problem}" for problem in self.plan.problems.values()]
        if kinds["finished"] + kinds["skipped"]:
            folders = dict.fromkeys(str(run.results) for run in self.plan.runs)
            lines += ["", *(f"python -m fisherprune.report {f}" for f in folders)]
        return "\n".join(lines)

    def _seconds(self) -> float:
        return time.monotonic() - self.start

    def _reasons(self, kind: str) -> list[str]:
        if kind not in ("failed", "left"):
            return []
        ends = ((run, self._outcome(run)) for run in self.plan.runs)
        return [f"        {r.name}: {o.text}" for r, o in ends if o.kind == kind]


def listing(plan: Plan) -> str:
    """Return the runs of a plan, each with its state, as text."""
    lines, kinds = [], Counter()
    for run in plan.runs:
        try:
            kind = store.state(run)
        except FisherpruneError as error:
            kind = f"damaged: {error}"
        held = (
            kind != "finished" and locks.Watch(run.locks, run.identity).next() is None
        )
        kind = "running" if held else kind
        kinds[kind.partition(":")[0]] += 1
        lines.append(f"{run.name}  {kind}")
    totals = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return "\n".join([*lines, "", f"{len(plan.runs)} runs: {totals}"])
