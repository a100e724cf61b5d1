"""Processes that hold locks."""

import multiprocessing
import os
import signal
from contextlib import contextmanager

from fisherprune.runs.locks import held

FORK = multiprocessing.get_context("fork")
LIMIT = 120
"""Seconds after which a test fails that waits for another process."""


class Holder:
    """A process that holds a lock until it is told otherwise."""

    def __init__(self, path):
        self._here, there = FORK.Pipe()
        self._process = FORK.Process(target=_hold, args=(path, there), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def has_it(self):
        """Wait until it holds the lock."""
        assert self._here.poll(LIMIT)
        return self._here.recv() == "held"

    def release(self):
        """Let it end."""
        self._here.send("release")
        self._end(0)

    def kill(self):
        """Kill it, whether it is stopped or not."""
        os.kill(self.pid, signal.SIGKILL)
        self._end(-signal.SIGKILL)

    def stop(self):
        """Stop it, and wait until it is."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self):
        """Let it go on after ``stop``."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, code):
        self._process.join(LIMIT)
        assert self._process.exitcode == code


def _hold(path, there):
    with held(path, wait=True):
        there.send("held")
        there.recv()


@contextmanager
def holder_of(path):
    """Yield a process that holds a lock."""
    it = Holder(path)
    try:
        assert it.has_it()
        yield it
    finally:
        if it._process.is_alive():
            it.kill()
