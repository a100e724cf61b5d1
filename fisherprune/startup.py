"""The first seconds of a command, while torch is imported."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once, without a traceback, if it is a command.

    That is ``python -m fisherprune.NAME``: while it imports the package, its
    ``sys.argv[0]`` is still ``-m``. Other programs keep their handling of Ctrl-C.
    """
    if (
        sys.argv[:1] != ["-m"]
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
