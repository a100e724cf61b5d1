"""Labelled images, from a few sources, as tensors on one device."""

from __future__ import annotations

from pathlib import Path

from fisherprune.data import cifar, digits, folder
from fisherprune.data.dataset import Augmentation, Batches, Dataset
from fisherprune.data.splits import stratified_choice, train_validation_split
from fisherprune.errors import FisherpruneError

IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "digits": 8, "folder": 32}
"""The datasets, and the size in pixels of their images where none is asked for."""

__all__ = [
    "IMAGE_SIZES",
    "Augmentation",
    "Batches",
    "Dataset",
    "load",
    "stratified_choice",
    "train_validation_split",
]


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    mirror: str | None = None,
    image_size: int | None = None,
    quiet: bool = False,
) -> tuple[Dataset, Dataset]:
    """Return the official training and test part of a dataset, on the CPU.

    Args:
        name: ``cifar10`` or ``cifar100`` (downloaded into ``data_dir`` where missing),
            ``digits`` (inside scikit-learn, needs no files) or ``folder`` (the images
            ``data_dir/train/CLASS/*`` and ``data_dir/test/CLASS/*``).
        data_dir: folder of the data.
        mirror: address of the folder to download the archive from, instead of its
            authors' server; the checksums stay.
        image_size: height and width to resize to; None is ``IMAGE_SIZES[name]``.
        quiet: no progress bar.

    Raises:
        FisherpruneError: for an unknown name, and where data are missing or broken.
    """
    if name not in IMAGE_SIZES:
        known = ", ".join(IMAGE_SIZES)
        raise FisherpruneError(f"dataset must be one of {known}; got {name!r}")
    size = IMAGE_SIZES[name] if image_size is None else image_size
    if name == "digits":
        return digits.load(size)
    if name == "folder":
        return folder.load(Path(data_dir), size, quiet=quiet)
    return cifar.load(name, Path(data_dir), mirror, size)
