"""The hash of sources, of the kernels' for setup.py too: nothing but Python."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

KERNELS = (".cpp", ".cu", ".cuh", ".h")
"""What kernels' sources end in."""


def source_hash(folder: Path, suffixes: Collection[str] = KERNELS) -> str:
    """Return a hash of the names and contents of all sources below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in suffixes):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
