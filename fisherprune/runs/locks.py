"""Who does what: locks between the processes of one machine.

The kernel keeps a lock for as long as its holder's process lives: a process that is
stopped holds it, one that is killed does not. The file of a lock names its holder, who
removes it at the end; the file of a killed process stays, and says nothing any more.
Machines that share a folder may not see each other's locks.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from fisherprune.errors import FisherpruneError

POLL = 0.5
"""Seconds between two looks at a lock that another process holds."""
MISSING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""


class Held(Exception):
    """Another process holds the lock; the message names it."""


@contextmanager
def held(path: Path, *, wait: bool = False, needed: bool = True) -> Iterator[None]:
    """Hold the lock ``path`` meanwhile.

    Args:
        path: a file that is there while the lock is held; its folder is made.
        wait: for another process that holds it.
        needed: False goes on without a lock where the file system has none.

    Raises:
        Held: where another process holds it, unless ``wait``.
        FisherpruneError: where the file system has no locks, but one is needed.
        OSError: where the file can't be made.
    """
    lock = FileLock(
        path,
        blocking=wait,
        poll_interval=POLL,
        fallback_to_soft=False,
        on_acquired=_sign,
    )
    try:
        lock.acquire()
    except Timeout:
        raise Held(holder(path) or "another process") from None
    except OSError as error:
        if error.errno not in MISSING:
            raise
        if needed:
            raise FisherpruneError(
                f"{path.parent} must be on a file system with locks, got one without "
                f"({error.strerror}): give a folder on a local disk by --output, or "
                "use --shard I/N or --executor ray, which need none"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # who waits sees that this file is gone, and makes another
        lock.release()


def _sign(handle: int) -> None:
    """Write into the file of a lock who holds it."""
    text = f"process {os.getpid()} on {socket.gethostname()}"
    with suppress(OSError):  # a full disk: it is held all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def holder(path: Path) -> str | None:
    """Return who holds the lock ``path``, in words; None where nobody does."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if lock_descriptor(handle, blocking=False):
            return None
        text = os.read(handle, 100).decode(errors="replace")
        return text if re.fullmatch(r"process \d+ on \S+", text) else "another process"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(handle)


def check(folder: Path) -> None:
    """Raise FisherpruneError where the file system of ``folder`` has no locks."""
    with suppress(Held, OSError), held(folder / "check.lock"):
        pass


def sweep(folder: Path) -> None:
    """Remove the files that killed processes left of their locks."""
    for path in folder.glob("*.lock"):
        with suppress(Held, OSError), held(path, needed=False):
            pass  # a folder that can only be read keeps them
