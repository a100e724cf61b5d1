"""Ctrl-C during a pass: it waits until what the pass changes can be put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class _Deferring:
    """A signal handler that keeps the signal for the handler that it stands in for."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.pending = False
        self.inside = False  # whether nothing is being changed or put back

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self.pending = self.pending, True
        if again and self.inside:
            self.deliver()

    def deliver(self) -> None:
        if self.pending:
            self.pending = False
            self.handler(signal.SIGINT, None)


def _is_main_thread() -> bool:
    """Return whether Python would run signal handlers in this thread."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def deferred_interrupts() -> Iterator[_Deferring | None]:
    """Keep SIGINT for ``deliver_interrupt``, and for the end of the context.

    The second one is delivered at once. Where SIGINT interrupts nothing, in other
    threads and under handlers that are not Python's, nothing is done.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or not _is_main_thread():
        yield None
        return
    deferring = _Deferring(before)
    signal.signal(signal.SIGINT, deferring)
    try:
        yield deferring
    finally:
        signal.signal(signal.SIGINT, before)
        deferring.deliver()


def deliver_interrupt() -> None:
    """Call the handler of a SIGINT that was kept: ``KeyboardInterrupt`` as a rule."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Deferring) and _is_main_thread():
        handler.deliver()
