"""One run of a study: claimed, done, tidied; its failure is a result, too."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch

from fisherprune import train
from fisherprune.errors import FisherpruneError
from fisherprune.experiments import leases as locks
from fisherprune.experiments import store
from fisherprune.experiments.leases import Lock, LockLost
from fisherprune.experiments.store import Run
from fisherprune.statistics.cache import StatisticsCache


@dataclass(frozen=True)
class Options:
    """How runs are done, beside what they are."""

    keep_weights: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a run ended."""

    kind: str
    """``finished``, ``skipped`` (it was already), ``failed``, ``left`` or ``locked``
    (another process has it)."""
    text: str = ""
    """The accuracy, or why not."""


def attempt(run: Run, generation: int, options: Options) -> Outcome:
    """Do a run under its lock.

    Args:
        run: what to do; continued where it was interrupted.
        generation: of the lock, as ``locks.Watch.next`` gave it.
        options: see there.

    Returns:
        The outcome; an exception of the run is written to its folder and makes it
        ``failed``. KeyboardInterrupt goes through, the lock is released.
    """
    lock = Lock(run.locks, run.identity, generation)
    try:
        if not lock.claim():
            return Outcome("locked")
    except OSError as error:
        return Outcome("failed", f"{lock.path}: {error.strerror}")
    done = False
    try:
        outcome = _attempt_held(run, lock, options)
        done = outcome.kind in ("finished", "skipped")
        return outcome
    finally:
        lock.release(done=done)


def _attempt_held(run: Run, lock: Lock, options: Options) -> Outcome:
    try:  # another process may have finished it since we looked, and been killed then
        if store.state(run) == "finished":
            store.tidy(run, options.keep_weights)
            return Outcome("skipped")
    except FisherpruneError as error:
        return Outcome("failed", str(error))
    start = time.monotonic()
    try:
        result = train.run(
            run.config,
            folder=run.folder,
            statistics=_statistics(run),
            checkpointed=lock.check,
            quiet=options.quiet,
        )
        store.tidy(run, options.keep_weights)
    except LockLost:
        return Outcome("locked")
    except Exception as error:
        return Outcome("failed", store.write_failure(run, error))
    finally:
        _free_memory()
    accuracy = f"test accuracy {100 * result.best.accuracy:.2f} %"
    return Outcome("finished", f"{accuracy}, {time.monotonic() - start:.1f} s")


def _statistics(run: Run) -> StatisticsCache:
    """Return the cache of a results folder, where one process computes, others wait."""
    return StatisticsCache(
        run.results / "statistics", lambda key: locks.held(run.locks, key)
    )


def _free_memory() -> None:
    """Let the next run have what this one had."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
