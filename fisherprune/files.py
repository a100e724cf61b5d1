"""Files written whole or not at all, and read with what is wrong with them said."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fisherprune.errors import FisherpruneError, shown

T = TypeVar("T")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; without an error it takes its place.

    For writers that take a path; see ``write_bytes``, of which it is the core. A new
    file has the permissions of the umask, a replaced one keeps its own.

    Raises:
        FisherpruneError: where ``path`` is a device or a pipe.
        OSError: where anything fails, a full disk say; its file name is ``path``.
    """
    path = Path(path)
    with _named_in_errors(path):
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        mode = _mode(path)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            if mode is not None:
                os.fchmod(handle, mode)
            os.close(handle)
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _mode(path: Path) -> int | None:
    """Return the permissions of the file that will be replaced, None for a new one."""
    try:
        found = path.stat().st_mode
    except FileNotFoundError:
        return None
    if not (stat.S_ISREG(found) or stat.S_ISDIR(found)):
        raise FisherpruneError(
            f"{path} must be a file or not be there, got a device or a pipe"
        )
    return stat.S_IMODE(found)


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError: of its own it names no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path`` and rename it into place.

    A reader sees the old file or the new one, never a part; on an error, a full disk
    say, the old file stays.

    Raises:
        OSError: where the folder is missing, not writable or full.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, like ``write_bytes``."""
    write_bytes(path, text.encode())


def read_as(path: Path, parse: Callable[[str], T], wrong: str) -> T:
    """Return what ``parse`` makes of a file of text.

    Raises:
        FisherpruneError: where it can't be read, or ``parse`` fails; then it says what
            is ``wrong``.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FisherpruneError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FisherpruneError(f"{path}: {wrong}: {error}") from None


def read_json(path: Path) -> dict:
    """Read a file that must hold a JSON object.

    Raises:
        FisherpruneError: where it can't be read, is cut off or holds something else.
    """
    wrong = "is no JSON: truncated, or not written by fisherprune"
    content = read_as(path, json.loads, wrong)
    if not isinstance(content, dict):
        raise FisherpruneError(f"{path}: must be a JSON object, got {shown(content)}")
    return content


def check_writable(path: Path, name: str = "output_dir") -> None:
    """Make the folder ``path`` and try a file in it; errors call it ``name``.

    Raises:
        FisherpruneError: where that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise FisherpruneError(
            f"{name} must be a folder that can be written to, got {path}: "
            f"{error.strerror}"
        ) from error
