"""Labelled images, from a few sources, as tensors on one device."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from fisherprune.data.dataset import Augmentation, Batches, Dataset
from fisherprune.data.registry import (
    BATCH_SIZES,
    IMAGE_SIZES,
    LOADERS,
    MIRRORED,
    Request,
    register_dataset,
)
from fisherprune.data.splits import (
    VALIDATION_SHARE,
    stratified_choice,
    train_validation_split,
)
from fisherprune.errors import FieldError, near, shown

__all__ = [
    "BATCH_SIZES",
    "IMAGE_SIZES",
    "MIRRORED",
    "VALIDATION_SHARE",
    "Augmentation",
    "Batches",
    "Dataset",
    "load",
    "register_dataset",
    "stratified_choice",
    "train_validation_split",
]

for _module in iter_modules(__path__):  # each dataset's registers it
    import_module(f"{__name__}.{_module.name}")


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
        name: ``cifar10``, ``cifar100`` or ``tinyimagenet`` (downloaded into
            ``data_dir`` where missing; the test part of TinyImageNet are its validation
            images), ``digits`` (inside scikit-learn, needs no files), ``folder`` (the
            images ``data_dir/train/CLASS/*`` and ``data_dir/test/CLASS/*``) or another
            name of ``register_dataset``.
        data_dir: folder of the data.
        mirror: address of the folder to download the archive from, instead of its
            authors' server; the checksums stay.
        image_size: height and width to resize to; None is ``IMAGE_SIZES[name]``.
        quiet: no progress bar.

    Raises:
        FisherpruneError: for an unknown name, and where data are missing or broken.
    """
    if name not in LOADERS:
        wanted = f"one of {', '.join(LOADERS)}"
        raise FieldError("dataset", wanted, f"{shown(name)}{near(name, LOADERS)}")
    size = IMAGE_SIZES[name] if image_size is None else image_size
    return LOADERS[name](Request(name, Path(data_dir), size, mirror, quiet))
