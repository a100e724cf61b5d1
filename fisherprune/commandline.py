"""What all command lines share: one line for a mistake, exit codes, Ctrl-C, pipes.

Imports nothing large and nothing that may be broken: the doctor runs on it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

from fisherprune.errors import FisherpruneError, near

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like any other, and suggest what is near.

    Options are never abbreviated, and descriptions are shown as they are written.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        """See ``argparse.ArgumentParser``."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, allow_abbrev=False, **options)
        self._given: list[str] = []

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; refuse what this parser, or that of a subcommand, does not know."""
        self._given = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(self._given, namespace)
        if unknown:
            raise self._unrecognized(unknown)
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving.

        Where something is missing, argparse does not come to look at unknown options;
        they say better what went wrong.
        """
        options = [a for a in self._given if a.startswith("-") and a.strip("-")]
        known = self._option_string_actions
        unknown = [a for a in options if a.partition("=")[0] not in known]
        if "required" in message and unknown:
            raise self._unrecognized(unknown)
        raise FisherpruneError(message)

    def _unrecognized(self, arguments: list[str]) -> FisherpruneError:
        options = [a.partition("=")[0] for a in arguments if a.startswith("--")]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        remarks = (near(option, known) for option in options)
        remark = next(filter(None, remarks), "")
        return FisherpruneError(
            f"unrecognized arguments: {' '.join(arguments)}{remark}"
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value or a subcommand that is none of the choices."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"must be one of {', '.join(known)}, got {value!r}"
                f"{near(str(value), known)}",
            )


def reader(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return ``read`` as an option's type: argparse shows what it complains of."""

    @wraps(read)
    def argument(text: str) -> T:
        try:
            return read(text)
        except FisherpruneError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


def path(text: str) -> Path:
    """Read a path; an empty one, of a variable that is not set, is no folder.

    Raises:
        ArgumentTypeError: where it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def _of(read: Callable[[str], T], words: str) -> Callable[[str], T]:
    """Return an option's type: what ``read`` reads must be ``words``."""

    def argument(text: str) -> T:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None

    return argument


number = _of(float, "a number")
"""Reads a number."""
whole = _of(int, "a whole number")
"""Reads a whole number."""


def prepare() -> None:
    """Make the process ready for a command, before anything large is imported.

    Ctrl-C ends the process at once, without a traceback from the middle of an import,
    until ``run_command`` handles it. A standard stream that is closed becomes one that
    nobody reads: else the next file that is opened would take its place.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    _set_interrupts(signal.default_int_handler, signal.SIG_DFL)


def _set_interrupts(before: Any, after: Any) -> None:
    """Handle Ctrl-C by ``after`` where it is handled by ``before``."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is before:
            signal.signal(signal.SIGINT, after)


class _Unbreakable:
    """A text stream that goes on, unread, when its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._or_nowhere(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._or_nowhere(self._stream.flush)

    def _or_nowhere(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered goes there too
            os.close(nowhere)
            return None


def run_command(name: str, work: Callable[[], int]) -> int:
    """Do the work of a command; return its exit code.

    2 after a mistake of the user's or a file that can't be read or written, with one
    line on stderr (for several wrong files, one each); 130 after Ctrl-C; else what
    ``work`` returns. It goes on when nobody reads its output any more.

    Args:
        name: of the command, as its messages begin.
        work: does everything, the reading of the command line included.
    """
    _set_interrupts(signal.SIG_DFL, signal.default_int_handler)
    out, err = (cast(TextIO, _Unbreakable(s)) for s in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            try:
                return work()
            finally:
                out.flush()
        except KeyboardInterrupt as error:
            print(f"{name}: {error if error.args else 'interrupted'}", file=err)
            return 130
        except (FisherpruneError, OSError) as error:
            for line in str(error).splitlines():
                print(f"{name}: error: {line}", file=err)
            return 2
