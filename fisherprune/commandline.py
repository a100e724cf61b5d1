"""What all command lines share: one line for a mistake, exit codes, Ctrl-C.

Imports nothing that may be broken: the doctor runs on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import NoReturn, TypeVar

from fisherprune.errors import FisherpruneError
from fisherprune.startup import heed_interrupts

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like any other.

    Options are never abbreviated, and descriptions are shown as they are written.
    """

    def __init__(self, prog: str | None = None, **options) -> None:
        """See ``argparse.ArgumentParser``."""
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, allow_abbrev=False, **options)
        self._given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        """Parse, and remember what was given."""
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving.

        Where something is missing, argparse does not come to look at unknown options;
        they say better what went wrong.
        """
        options = [a for a in self._given if a.startswith("-") and a.strip("-")]
        known = self._option_string_actions
        unknown = [a for a in options if a.partition("=")[0] not in known]
        if "required" in message and unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
        raise FisherpruneError(message)


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


def number(text: str) -> float:
    """Read a number.

    Raises:
        ArgumentTypeError: where it is none.
    """
    return _read(float, text, "a number")


def whole(text: str) -> int:
    """Read a whole number.

    Raises:
        ArgumentTypeError: where it is none.
    """
    return _read(int, text, "a whole number")


def _read(read: Callable[[str], T], text: str, words: str) -> T:
    try:
        return read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None


def run_command(name: str, work: Callable[[], int]) -> int:
    """Do the work of a command; return its exit code.

    2 after a mistake of the user's or a file that can't be read or written, with one
    line on stderr (for several wrong files, one each); 130 after Ctrl-C; else what
    ``work`` returns.

    Args:
        name: of the command, as its messages begin.
        work: does everything, the reading of the command line included.
    """
    heed_interrupts()
    try:
        return work()
    except KeyboardInterrupt as error:
        print(f"{name}: {error if error.args else 'interrupted'}", file=sys.stderr)
        return 130
    except (FisherpruneError, OSError) as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
