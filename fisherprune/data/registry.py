"""The datasets by name: each registers itself with what is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fisherprune.data.dataset import Dataset


@dataclass(frozen=True)
class Request:
    """Which images are asked for; a dataset reads what concerns it."""

    name: str
    data_dir: Path
    image_size: int
    """Height and width in pixels."""
    mirror: str | None
    """Address of the folder to download the archive from, None for its authors'."""
    quiet: bool
    """Whether to show no progress bar."""


Load = Callable[[Request], tuple[Dataset, Dataset]]
"""Returns the official training and test part."""
L = TypeVar("L", bound=Load)

LOADERS: dict[str, Load] = {}
IMAGE_SIZES: dict[str, int] = {}
"""The datasets, and the size in pixels of their images where none is asked for."""
BATCH_SIZES: dict[str, int] = {}
"""Images of a training step where none is asked for."""
MIRRORED: list[str] = []
"""The datasets that are downloaded, from a mirror if one is asked for."""


def register_dataset(
    name: str, *, image_size: int, batch_size: int, mirrored: bool = False
) -> Callable[[L], L]:
    """Return the decorator that adds a dataset under a name.

    Args:
        name: by which a run asks for it.
        image_size: see ``IMAGE_SIZES``.
        batch_size: see ``BATCH_SIZES``.
        mirrored: whether it is downloaded.
    """

    def register(load: L) -> L:
        LOADERS[name] = load
        IMAGE_SIZES[name], BATCH_SIZES[name] = image_size, batch_size
        if mirrored:
            MIRRORED.append(name)
        return load

    return register
