"""The first seconds of a command, while torch is imported."""

from __future__ import annotations

import signal
import sys
import threading

_silenced = False


def silence_interrupts() -> None:
    """Let Ctrl-C end the process at once, without a traceback, if it is a command.

    That is ``python -m fisherprune.NAME``: while it imports the package, its
    ``sys.argv[0]`` is still ``-m``. Other programs keep their handling of Ctrl-C.
    """
    global _silenced
    if (
        _is_command()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _silenced = True


def heed_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: the command has begun."""
    global _silenced
    if _silenced:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _silenced = False


def _is_command() -> bool:
    module = sys.orig_argv[-len(sys.argv) :][:1]  # after it, both have the same
    return sys.argv[:1] == ["-m"] and module[0].removeprefix("-m").startswith(
        "fisherprune."
    )
