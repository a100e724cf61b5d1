"""The fingerprint of the kernels' sources, for setup.py too: nothing but Python."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}


def source_hash(csrc: Path) -> str:
    """Return a hash of the names and contents of all sources below ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in SUFFIXES):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
