"""Statistics of passes over the data, kept in files for the runs that need them too.

A file's name hashes all that its content depends on (``key.py``), so a file is right or
is never asked for: nothing goes stale, and any file may be deleted any time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.files import write_bytes
from fisherprune.statistics.key import hash_of
from fisherprune.statistics.passes import ModelStatistics

FORMAT = "fisherprune-statistics-3"
"""Changes whenever the files do."""

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by parameter name, by letter."""


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
        self, key: str, like: Tensors, compute: Callable[[], ModelStatistics]
    ) -> ModelStatistics:
        """Return what is kept under ``key``, or else compute and keep it.

        A damaged or foreign file is reported on stderr and replaced. Where nothing can
        be written, that is reported, and the statistics are used all the same.

        Args:
            key: a hash of all that the result depends on.
            like: tensors of the shapes that the result has, on its devices.
            compute: the pass.
        """
        path = self.folder / f"{key}.safetensors"
        found = _read(path, like)
        if found is None:
            with self.exclusive(key):
                found = _read(path, like)  # another may have been quicker
                if found is None:
                    found = compute()
                    _write(path, found)
        return found


def _read(path: Path, like: Tensors) -> ModelStatistics | None:
    try:
        return _decoded(path.read_bytes(), path.stem, like)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        _report(f"cached statistics {path} can't be used, computing them again", error)
    try:
        path.unlink(missing_ok=True)
    except OSError:  # then it stays until it is replaced
        pass
    return None


def _decoded(data: bytes, key: str, like: Tensors) -> ModelStatistics:
    """Return the statistics of a file's content, checked from end to end."""
    tensors = load(data)  # checks the header, which safetensors can't show from memory
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if (metadata.get("format"), metadata.get("key")) != (FORMAT, key):
        raise ValueError("it holds something else")
    found = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    wanted = {n: (torch.float32, tuple(t.shape)) for n, t in _joined(like).items()}
    if found != wanted:
        raise ValueError("its tensors are of another network")
    if metadata.get("checksum") != _checksum(tensors, metadata):
        raise ValueError("its checksum is wrong")
    parts = {
        part: {n: tensors[f"{part}/{n}"].to(t.device) for n, t in named.items()}
        for part, named in like.items()
    }
    samples, group_size = int(metadata["samples"]), int(metadata["group_size"])
    seconds = float(metadata["seconds"])
    exponents = json.loads(metadata["exponents"])
    return ModelStatistics(parts, samples, group_size, seconds, True, exponents)


def _write(path: Path, found: ModelStatistics) -> None:
    named = _joined(found.parts)
    tensors = {n: t.detach().cpu().contiguous() for n, t in named.items()}
    metadata = {
        "format": FORMAT,
        "key": path.stem,
        "samples": str(found.samples),
        "group_size": str(found.group_size),
        "seconds": repr(found.seconds),
        "exponents": json.dumps(found.exponents),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    try:
        write_bytes(path, save(tensors, metadata))
    except OSError as error:
        _report(f"statistics can't be kept in {path}", error)


def _joined(parts: Tensors) -> dict[str, Tensor]:
    return {f"{p}/{name}": t for p, named in parts.items() for name, t in named.items()}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    known = {name: value for name, value in metadata.items() if name != "checksum"}
    values = [v for name in sorted(tensors) for v in (name, tensors[name])]
    return hash_of(*sorted(known.items()), *values)


def _report(what: str, reason: Exception) -> None:
    """Report on stderr what can't be used, and why."""
    print(f"fisherprune: {what}: {' '.join(f'{reason}'.split())}", file=sys.stderr)
