"""Image files in class folders, decoded once and kept as one file of tensors.

    DATA_DIR/train/CLASS/anything.png    DATA_DIR/test/CLASS/anything.jpg

Every file in a class folder must be an image that Pillow reads; only names that begin
with a dot are passed over. Images become RGB and are resized, not cropped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fisherprune.data.dataset import Augmentation, Dataset, channel_statistics
from fisherprune.data.decoded import decoded
from fisherprune.data.registry import Request, register_dataset
from fisherprune.errors import FisherpruneError

PARTS = ("train", "test")


@register_dataset("folder", image_size=32, batch_size=512)
def load(request: Request) -> tuple[Dataset, Dataset]:
    """Return the training and the test part, from the cache where it is up to date.

    Raises:
        FisherpruneError: naming the path, for missing or empty folders, classes that
            the two parts do not share, and files that are no images.
    """
    data_dir, image_size = request.data_dir, request.image_size
    classes = _classes(data_dir)
    files = {part: _files(data_dir / part, classes) for part in PARTS}
    tensors = decoded(data_dir, files, image_size, request.quiet)
    mean, std = channel_statistics(tensors["train"])
    augmentation = Augmentation(padding=image_size // 8, flip=True)
    train, test = (
        Dataset(
            tensors[part],
            torch.tensor([label for _, label in files[part]]),
            classes,
            mean,
            std,
            augmentation,
        )
        for part in PARTS
    )
    return train, test


def class_files(folder: Path) -> tuple[list[tuple[os.DirEntry, int]], tuple[str, ...]]:
    """Return the image files ``folder/CLASS/*``, each with its label, and the classes.

    Raises:
        FisherpruneError: where there are none.
    """
    classes = tuple(e.name for e in _entries(folder) if os.path.isdir(e.path))
    if not classes:
        raise FisherpruneError(
            f"folder dataset: {folder} must hold class folders, got none"
        )
    return _files(folder, classes), classes


def _entries(folder: Path) -> list[os.DirEntry]:
    """Return what is in a folder by name, without names that begin with a dot."""
    if not folder.is_dir():
        raise FisherpruneError(f"folder dataset: {folder} must be a folder, got none")
    entries = [e for e in os.scandir(folder) if not e.name.startswith(".")]
    return sorted(entries, key=lambda entry: entry.name)


def _classes(data_dir: Path) -> tuple[str, ...]:
    """Return the names of the class folders, which both parts must share."""
    names = {
        part: [e.name for e in _entries(data_dir / part) if os.path.isdir(e.path)]
        for part in PARTS
    }
    if not names["train"]:
        raise FisherpruneError(
            f"folder dataset: {data_dir / 'train'} must hold class folders, got none"
        )
    for part, other in (PARTS, PARTS[::-1]):
        for name in names[part]:
            if name not in names[other]:
                raise FisherpruneError(
                    f"folder dataset: class folder {data_dir / other / name} is "
                    f"missing, but {data_dir / part / name} exists"
                )
    return tuple(names["train"])


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[os.DirEntry, int]]:
    """Return the image files below a part's folder, each with its label."""
    files = []
    for label, name in enumerate(classes):
        entries = _entries(folder / name)
        if not entries:
            raise FisherpruneError(f"folder dataset: no images in {folder / name}")
        for entry in entries:
            if not os.path.isfile(entry.path):  # a loop of links is none
                raise FisherpruneError(
                    f"folder dataset: {entry.path} must be an image file"
                )
            files.append((entry, label))
    return files
