"""Independent random streams, each derived from the seed of a run and a name.

Because no two purposes share a stream, using more random numbers for one (another
criterion, another image size) leaves all others as they were.
"""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, name: str) -> int:
    """Return the seed, in [0, 2**63), of the stream called ``name``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, name: str) -> torch.Generator:
    """Return a fresh CPU generator at the start of the stream called ``name``."""
    return torch.Generator("cpu").manual_seed(stream_seed(seed, name))
