"""Statistics of passes over the data, kept in files for the runs that need them too.

A file's name hashes all that its content depends on (``fingerprint.py``), so a file is
right or is never asked for: nothing goes stale, and any file may be deleted any time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.files import write_bytes
from fisherprune.statistics.fingerprint import Digest

FORMAT = "fisherprune-statistics-1"
"""Changes whenever the same data would give other statistics, or other files."""


@dataclass(frozen=True)
class Entry:
    """What a pass over the data found out, and what it cost."""

    tensors: dict[str, Tensor]
    """Float32, by name."""
    samples: int
    """Samples seen."""
    groups: int
    """Groups of samples seen."""
    seconds: float = 0.0
    """Wall time of the pass, when it was run."""
    cached: bool = False
    """Whether it was read from a file."""

    def checksum(self) -> str:
        """Return a hash of the content."""
        digest = Digest()
        digest.add(self.samples, self.groups, self.seconds)
        for name in sorted(self.tensors):
            digest.add(name, self.tensors[name])
        return digest.hexdigest()


class StatisticsCache:
    """A folder of ``KEY.safetensors`` files, each written whole.

    Args:
        folder: made where it is missing.
        exclusive: ``key -> context``, entered around a pass: a lock, so that of two
            processes one waits and reads what the other found out. Without it both may
            run the pass, which costs time and nothing else.

    Raises:
        FisherpruneError: where the folder can't be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        exclusive: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.folder, self.exclusive = Path(folder), exclusive
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FisherpruneError(
                "statistics must be a folder that can be written to, got "
                f"{self.folder}: {error.strerror}"
            ) from None

    def get(
        self,
        key: str,
        shapes: Mapping[str, Sequence[int]],
        compute: Callable[[], Entry],
    ) -> Entry:
        """Return what is kept under ``key``, or else compute and keep it.

        A damaged or foreign file is noticed on stderr and replaced; where nothing can
        be written, that is noticed, and the statistics are used all the same.

        Args:
            key: a hash of all that the entry depends on.
            shapes: of the entry's tensors, by name.
            compute: the pass.
        """
        path = self.folder / f"{key}.safetensors"
        entry = _read(path, shapes)
        if entry is None:
            with self.exclusive(key):
                entry = _read(path, shapes)  # another may have been quicker
                if entry is None:
                    entry = compute()
                    _write(path, entry)
        return entry


def _read(path: Path, shapes: Mapping[str, Sequence[int]]) -> Entry | None:
    try:
        return _decoded(path.read_bytes(), path.stem, shapes)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        notice(f"cached statistics {path} can't be used, computing them again", error)
    try:
        path.unlink(missing_ok=True)
    except OSError:  # then it stays until it is replaced
        pass
    return None


def _decoded(data: bytes, key: str, shapes: Mapping[str, Sequence[int]]) -> Entry:
    """Return the entry of a file's content, checked from end to end."""
    tensors = load(data)  # checks the header, which safetensors can't show from memory
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
        raise ValueError("it holds something else")
    found = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    if found != {n: (torch.float32, tuple(shape)) for n, shape in shapes.items()}:
        raise ValueError("its tensors are of another network")
    try:
        samples, groups = int(metadata["samples"]), int(metadata["groups"])
        entry = Entry(tensors, samples, groups, float(metadata["seconds"]), True)
    except KeyError as error:
        raise ValueError(f"it does not say {error}") from None
    if entry.checksum() != metadata.get("checksum"):
        raise ValueError("its checksum is wrong")
    return entry


def _write(path: Path, entry: Entry) -> None:
    tensors = {n: t.detach().cpu().contiguous() for n, t in entry.tensors.items()}
    metadata = {
        "format": FORMAT,
        "key": path.stem,
        "samples": str(entry.samples),
        "groups": str(entry.groups),
        "seconds": repr(entry.seconds),
        "checksum": replace(entry, tensors=tensors).checksum(),
    }
    try:
        write_bytes(path, save(tensors, metadata))
    except OSError as error:
        notice(f"statistics can't be kept in {path}", error)


def notice(what: str, reason: Exception) -> None:
    """Say on stderr what is done without, and why."""
    print(f"fisherprune: {what}: {' '.join(f'{reason}'.split())}", file=sys.stderr)
