"""One run of a study: claimed, done, tidied; its failure is a result, too."""

from __future__ import annotations

import enum
import gc
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fisherprune import train
from fisherprune.experiments import store
from fisherprune.experiments.store import StudyRun
from fisherprune.runs.locks import Held, held
from fisherprune.statistics.cache import StatisticsCache


@dataclass(frozen=True)
class Options:
    """How runs are done, beside what they are."""

    keep_weights: bool = False
    quiet: bool = False
    needs_lock: bool = True
    """Whether no run begins on a file system without locks."""


class End(enum.Enum):
    """How an attempt at a run ended."""

    FINISHED = "finished"
    SKIPPED = "skipped"
    """It was finished already."""
    FAILED = "failed"
    LEFT = "left"
    """There was no time for it."""
    LOCKED = "locked"
    """Another process does it."""


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt at a run."""

    end: End
    text: str = ""
    """The accuracy, or why not."""


def attempt(run: StudyRun, options: Options) -> Outcome:
    """Do a run under its lock, continued where it was interrupted.

    Returns:
        The outcome; an exception of the run is written to its folder and makes it
        ``FAILED``. KeyboardInterrupt goes through, the lock is released.
    """
    try:
        with held(run.lock, needed=options.needs_lock):
            # another process may have finished it since we looked, and been killed then
            if store.state(run) == "finished":
                store.tidy(run, options.keep_weights)
                return Outcome(End.SKIPPED)
            return _train(run, options)
    except Held:
        return Outcome(End.LOCKED)
    except (OSError, ValueError) as error:
        return Outcome(End.FAILED, store.line(error))


def _train(run: StudyRun, options: Options) -> Outcome:
    start = time.monotonic()
    try:
        result = train.run(
            run.config,
            folder=run.folder,
            statistics=_statistics(run, options),
            quiet=options.quiet,
        )
        store.tidy(run, options.keep_weights)
    except Exception as error:
        return Outcome(End.FAILED, store.write_failure(run, error))
    finally:
        _free_memory()
    accuracy = f"test accuracy {100 * result.best.accuracy:.2f} %"
    return Outcome(End.FINISHED, f"{accuracy}, {time.monotonic() - start:.1f} s")


def _statistics(run: StudyRun, options: Options) -> StatisticsCache:
    """Return the cache of a results folder, where one process computes, others wait."""

    def alone(key: str) -> AbstractContextManager[None]:
        path = run.locks / f"{key}.lock"
        return held(path, wait=True, needed=options.needs_lock)

    return StatisticsCache(run.results / "statistics", alone)


def _free_memory() -> None:
    """Let the next run have what this one had."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
