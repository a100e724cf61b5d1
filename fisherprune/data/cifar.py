"""CIFAR-10 and CIFAR-100, through torchvision, which checks every file's checksum."""

from __future__ import annotations

import os
from http.client import HTTPException
from pathlib import Path

import torch

from fisherprune.data.dataset import Augmentation, Dataset, resized
from fisherprune.errors import FisherpruneError

# Of the 50,000 training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load(
    name: str, data_dir: Path, mirror: str | None, image_size: int
) -> tuple[Dataset, Dataset]:
    """Return the 50,000 training and 10,000 test images, downloaded where missing.

    Args:
        name: ``cifar10`` or ``cifar100``.
        data_dir: where the archive and its unpacked folder are or will be.
        mirror: address of the folder to download the archive from instead of its
            authors' server; the checksums stay.
        image_size: 32 leaves the images as they are.

    Raises:
        FisherpruneError: where the data are neither there nor to be had, or
            ``data_dir`` can't be a folder.
    """
    _check_folder(data_dir)
    source = _source(name, mirror)
    try:
        parts = [source(data_dir, train=part, download=part) for part in (True, False)]
    except (OSError, RuntimeError, HTTPException, ValueError) as error:
        raise FisherpruneError(_no_data(name, source, data_dir, error)) from error
    train, test = (_dataset(name, part, image_size) for part in parts)
    return train, test


def _check_folder(data_dir: Path) -> None:
    """Raise where ``data_dir`` is a file, or would be in one."""
    for path in (data_dir, *data_dir.parents):
        if os.path.isdir(path):
            return
        if os.path.exists(path):
            raise FisherpruneError(
                f"data_dir must be a folder, got {data_dir}: {path} is none"
            )


def _source(name: str, mirror: str | None) -> type:
    """Return torchvision's class of the dataset, with its address replaced."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise FisherpruneError(
            f"{name}: torchvision does not load beside torch {torch.__version__}: "
            f"{error}; install the torchvision of the same release and build"
        ) from error
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if mirror is None:
        return source
    url = f"{mirror.rstrip('/')}/{source.filename}"
    return type(source.__name__, (source,), {"url": url})


def _no_data(name: str, source: type, data_dir: Path, error: Exception) -> str:
    reason = " ".join(f"{error}".split()) or type(error).__name__
    return (
        f"{name}: no complete data in {data_dir / source.base_folder}, and the "
        f"download of {source.url} failed: {reason}; put {source.filename} (md5 "
        f"{source.tgz_md5}) into {data_dir} or name another address with "
        f"--data-mirror; --dataset digits needs neither files nor a network"
    )


def _dataset(name: str, source, image_size: int) -> Dataset:
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    mean, std = STATISTICS[name]
    return Dataset(
        resized(images, image_size),
        torch.tensor(source.targets),
        tuple(source.classes),
        mean,
        std,
        Augmentation(padding=image_size // 8, flip=True),
    )
