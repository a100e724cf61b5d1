"""Who does what: locks as files, for processes of one machine or a shared folder.

The lock NAME is held by whoever made the file ``NAME.N`` of the highest N, which is
created exclusively, so that one claimant wins. Its holder rewrites it every few seconds
with a growing counter. It is free again when it says so, when its process is gone (seen
on the same machine), or when the counter stood still for EXPIRY seconds of the
watcher's monotonic clock: no clock is compared with another. To take a lock over is to
create the next N. Whoever is done for good removes the files of all generations up to
its own. A holder that finds a higher N, or its own file gone or another's, has lost the
lock and stops: it writes to the file it created alone, and never creates it anew.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fisherprune.errors import FisherpruneError

HEARTBEAT = 5.0
"""Seconds between two signs of life."""
EXPIRY = 60.0
"""Seconds without one after which a holder counts as dead."""
POLL = 0.5
"""Seconds between two looks at a lock that another process holds."""


class LockLost(Exception):
    """Another process has taken the lock over; what it protects is no longer ours."""


def machine() -> list[str | None]:
    """Return what must be equal for process numbers to mean the same process."""
    return [
        socket.gethostname(),
        _text("/proc/sys/kernel/random/boot_id"),
        _link("/proc/self/ns/pid"),
    ]


def started(pid: int) -> str | None:
    """Return when a process began, in the system's own ticks; None where unknown.

    Raises:
        ProcessLookupError: where there is no such process, or only its remains.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except PermissionError:  # it is there, and another user's
            pass
        return None
    text = _text(f"/proc/{pid}/stat")
    if text is None:
        raise ProcessLookupError(pid)
    state, *rest = text.rpartition(")")[2].split()  # the name may hold anything
    if state in "ZX":
        raise ProcessLookupError(pid)
    return rest[18]


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def generations(folder: Path, name: str) -> list[int]:
    """Return the numbers of the files of a lock, ascending."""
    found = (path.name.rpartition(".") for path in folder.glob(f"{name}.*"))
    return sorted(int(n) for stem, _, n in found if stem == name and n.isdigit())


def sweep(folder: Path) -> None:
    """Remove the files of locks that nobody holds any more.

    A process that was killed between its work and the end of its lock leaves them, and
    whoever finds the work done has no need of the lock.
    """
    for name in {path.stem for path in folder.glob("[!.]*.*")}:
        generation = Watch(folder, name).next()
        if generation in (None, 1):
            continue
        lock = Lock(folder, name, generation)
        try:
            if lock.claim():
                lock.release(done=True)
        except OSError:  # a folder that can only be read keeps them
            return


class Watch:
    """Looks at a lock, and remembers since when its holder shows no sign of life."""

    def __init__(self, folder: Path, name: str, *, expiry: float | None = None) -> None:
        """Watch the lock ``name``."""
        self.folder, self.name = folder, name
        self.expiry = EXPIRY if expiry is None else expiry
        self._seen: tuple[int, str | None] | None = None
        self._since = 0.0

    def next(self) -> int | None:
        """Return the generation a claimant may create; None while the lock is held."""
        highest = max(generations(self.folder, self.name), default=0)
        if not highest:
            return 1
        text = _text(self.folder / f"{self.name}.{highest}")
        return highest + 1 if self._free(highest, text) else None

    def left(self) -> bool:
        """Return whether there are files of a lock that nobody holds any more."""
        return self.next() not in (None, 1)

    def holder(self) -> str:
        """Return who holds the lock, in words."""
        highest = max(generations(self.folder, self.name), default=0)
        content = _content(_text(self.folder / f"{self.name}.{highest}"))
        if not content:
            return "another process"
        return f"process {content['pid']} on {content['machine'][0]}"

    def _free(self, generation: int, text: str | None) -> bool:
        content = _content(text)
        if content.get("state") == "released":
            return True
        if content and content["machine"] == machine():
            try:
                if started(content["pid"]) != content["started"]:
                    return True
            except ProcessLookupError:
                return True
        now = time.monotonic()
        if self._seen != (generation, text):
            self._seen, self._since = (generation, text), now
        return now - self._since >= self.expiry


def _content(text: str | None) -> dict:
    """Return what a lock's file says; nothing where it is not (yet) whole."""
    try:
        content = json.loads(text or "")
        if isinstance(content, dict) and {"machine", "pid", "started"} <= set(content):
            return content
    except ValueError:
        pass
    return {}


class Lock:
    """One generation of a lock, held by this process from ``claim`` to ``release``."""

    def __init__(
        self,
        folder: Path,
        name: str,
        generation: int,
        *,
        heartbeat: float | None = None,
    ) -> None:
        """Prepare to claim ``name`` by the file ``name.generation``."""
        self.folder, self.name, self.generation = folder, name, generation
        self.path = folder / f"{name}.{generation}"
        self.heartbeat = HEARTBEAT if heartbeat is None else heartbeat
        self._beats = 0
        self._handle: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> bool:
        """Create the file; False where another process was faster.

        Raises:
            OSError: where the folder can't be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            self._handle = os.open(self.path, flags, 0o666)
        except FileExistsError:
            return False
        try:
            self._write("held")
            lost = self.lost()
        except OSError:
            self._withdraw()
            raise
        if lost:  # others went on from a generation that is removed by now
            self._withdraw()
            return False
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return True

    def lost(self) -> bool:
        """Return whether another process has taken the lock over."""
        highest = max(generations(self.folder, self.name), default=0)
        return highest > self.generation or (
            self._handle is not None and not self._is_there()
        )

    def _is_there(self) -> bool:
        """Return whether the file at our path is the one that ``claim`` created.

        As long as it is open here, no other file gets its number.
        """
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise

    def check(self) -> None:
        """Raise LockLost where another process has taken the lock over."""
        if self.lost():
            raise LockLost(f"{self.path}: another process has taken over")

    def release(self, *, done: bool = False) -> None:
        """Give the lock back.

        Args:
            done: what it protects exists now, which claimants see by themselves: the
                files of the lock are removed.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._handle is None or self.lost():
                return
            if done:
                self._remove()
                return
            with suppress(OSError):  # a full disk: free as soon as this process ends
                self._write("released")
        finally:
            self._close()

    def _withdraw(self) -> None:
        """Undo a claim."""
        if self._is_there():
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _remove(self) -> None:
        """Remove this and all earlier files, and what killed processes left of them."""
        for number in generations(self.folder, self.name):
            if number <= self.generation:
                (self.folder / f"{self.name}.{number}").unlink(missing_ok=True)
        for left in self.folder.glob(f".{self.name}.*"):
            left.unlink(missing_ok=True)

    def _write(self, state: str) -> None:
        """Rewrite the file in place: one that was removed does not come back.

        A reader that comes in between sees other text than before, a sign of life.
        """
        data = self._text(state).encode()
        os.ftruncate(self._handle, os.pwrite(self._handle, data, 0))
        os.fsync(self._handle)

    def _text(self, state: str) -> str:
        pid = os.getpid()
        content = {
            "machine": machine(),
            "pid": pid,
            "started": started(pid),
            "beat": self._beats,
            "state": state,
        }
        return json.dumps(content)

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            try:
                if self.lost():
                    return
                self._beats += 1
                self._write("held")
            except OSError:  # a full disk: perhaps the next one comes through
                pass


@contextmanager
def held(
    folder: Path,
    name: str,
    *,
    expiry: float | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Iterator[Lock]:
    """Wait for a lock, hold it, release it; ``done`` where the body raised nothing.

    Args:
        folder: where the lock's files are.
        name: of the lock.
        expiry: as in ``Watch``.
        waiting: called once with the holder where the lock is not free at once.

    Raises:
        FisherpruneError: where the folder can't be written to.
    """
    watch = Watch(folder, name, expiry=expiry)
    while True:
        generation = watch.next()
        lock = Lock(folder, name, generation or 0)
        try:
            if generation is not None and lock.claim():
                break
        except OSError as error:
            raise FisherpruneError(f"{lock.path}: {error.strerror}") from error
        if waiting is not None:
            waiting(watch.holder())
            waiting = None
        time.sleep(POLL)
    done = False
    try:
        yield lock
        done = True
    finally:
        lock.release(done=done)
