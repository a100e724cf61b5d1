"""Statistics of passes over the data, kept in files for the runs that need them too.

A file's name hashes all that its content depends on (``key.py``), so a file is right or
is never asked for: nothing goes stale, and any file may be deleted any time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.files import write_bytes
from fisherprune.statistics.key import Digest
from fisherprune.statistics.passes import ModelStatistics

FORMAT = "fisherprune-statistics-2"
"""Changes whenever the files do."""

Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""Of tensors, by part and parameter name."""

T = TypeVar("T")


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
        self, key: str, shapes: Shapes, compute: Callable[[], ModelStatistics]
    ) -> ModelStatistics:
        """Return what is kept under ``key``, or else compute and keep it.

        A damaged or foreign file is noticed on stderr and replaced; where nothing can
        be written, that is noticed, and the statistics are used all the same.

        Args:
            key: a hash of all that the result depends on.
            shapes: of the result's tensors.
            compute: the pass.

        Returns:
            The result, on the CPU where it was read from a file.
        """
        path = self.folder / f"{key}.safetensors"
        found = _read(path, shapes)
        if found is None:
            with self.exclusive(key):
                found = _read(path, shapes)  # another may have been quicker
                if found is None:
                    found = compute()
                    _write(path, found)
        return found


def _read(path: Path, shapes: Shapes) -> ModelStatistics | None:
    try:
        return _decoded(path.read_bytes(), path.stem, shapes)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        _notice(f"cached statistics {path} can't be used, computing them again", error)
    try:
        path.unlink(missing_ok=True)
    except OSError:  # then it stays until it is replaced
        pass
    return None


def _decoded(data: bytes, key: str, shapes: Shapes) -> ModelStatistics:
    """Return the statistics of a file's content, checked from end to end."""
    tensors = load(data)  # checks the header, which safetensors can't show from memory
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
        raise ValueError("it holds something else")
    found = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    wanted = _joined(shapes)
    if found != {n: (torch.float32, tuple(shape)) for n, shape in wanted.items()}:
        raise ValueError("its tensors are of another network")
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise ValueError("its checksum is wrong")
    return ModelStatistics(
        {
            part: {n: tensors[f"{part}/{n}"] for n in named}
            for part, named in shapes.items()
        },
        int(metadata["samples"]),
        int(metadata["group_size"]),
        float(metadata["seconds"]),
        cached=True,
    )


def _write(path: Path, found: ModelStatistics) -> None:
    named = _joined(found.parts)
    tensors = {n: t.detach().cpu().contiguous() for n, t in named.items()}
    metadata = {
        "format": FORMAT,
        "key": path.stem,
        "samples": str(found.samples),
        "group_size": str(found.group_size),
        "seconds": repr(found.seconds),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    try:
        write_bytes(path, save(tensors, metadata))
    except OSError as error:
        _notice(f"statistics can't be kept in {path}", error)


def _joined(parts: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    return {f"{p}/{name}": t for p, named in parts.items() for name, t in named.items()}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = Digest()
    for name in sorted(metadata.keys() - {"checksum"}):
        digest.add(name, metadata[name])
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.hexdigest()


def _notice(what: str, reason: Exception) -> None:
    """Say on stderr what is done without, and why."""
    print(f"fisherprune: {what}: {' '.join(f'{reason}'.split())}", file=sys.stderr)
