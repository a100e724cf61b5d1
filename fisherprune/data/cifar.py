"""CIFAR-10 and CIFAR-100, through torchvision, which checks every file's checksum."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from fisherprune.data.dataset import Augmentation, Dataset, resized
from fisherprune.data.registry import Request, register_dataset
from fisherprune.errors import FisherpruneError
from fisherprune.packages import torchvision_for

PATIENCE = 60.0
"""Seconds a server may be silent."""

# Of the 50,000 training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@register_dataset("cifar100", image_size=32, batch_size=512, mirrored=True)
@register_dataset("cifar10", image_size=32, batch_size=512, mirrored=True)
def load(request: Request) -> tuple[Dataset, Dataset]:
    """Return the 50,000 training and 10,000 test images, downloaded where missing.

    The archive and its unpacked folder are or will be in the request's ``data_dir``;
    ``image_size`` 32 leaves the images as they are.

    Raises:
        FisherpruneError: where the data are neither there nor to be had, or
            ``data_dir`` can't be a folder.
    """
    name, folder = request.name, request.data_dir
    _check_folder(folder)
    source = _source(name, request.mirror)
    _check_files(folder / source.filename, *folder.glob(f"{source.base_folder}/*"))
    try:
        with _patience():
            parts = [
                source(folder, train=part, download=part) for part in (True, False)
            ]
    except (OSError, RuntimeError, HTTPException, ValueError) as error:
        raise FisherpruneError(_no_data(name, source, folder, error)) from error
    train, test = (_dataset(name, part, request.image_size) for part in parts)
    return train, test


@contextmanager
def _patience() -> Iterator[None]:
    """Give up on servers that are silent: torchvision waits for them for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_files(*paths: Path) -> None:
    """Raise for what would be read and is no file, a pipe that nobody writes to say."""
    for path in paths:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise FisherpruneError(
                f"data_dir: {path} must be a file, got something else"
            )


def _check_folder(data_dir: Path) -> None:
    """Raise where ``data_dir`` is a file, or would be in one."""
    for path in (data_dir, *data_dir.parents):
        if os.path.isdir(path):
            return
        if os.path.exists(path):
            raise FisherpruneError(
                f"data_dir must be a folder, got {data_dir}: {path} is none"
            )


def _source(name: str, mirror: str | None) -> Any:
    """Return torchvision's class of the dataset, with its address replaced.

    torchvision has no types.
    """
    datasets = torchvision_for(name, "datasets")
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if mirror is None:
        return source
    url = f"{mirror.rstrip('/')}/{source.filename}"
    return type(source.__name__, (source,), {"url": url})


def _no_data(name: str, source: Any, data_dir: Path, error: Exception) -> str:
    reason = " ".join(f"{error}".split()) or type(error).__name__
    return (
        f"{name}: no complete data in {data_dir / source.base_folder}, and the "
        f"download of {source.url} failed: {reason}; put {source.filename} (md5 "
        f"{source.tgz_md5}) into {data_dir} or name another address with "
        f"--data-mirror; --dataset digits needs neither files nor a network"
    )


def _dataset(name: str, source: Any, image_size: int) -> Dataset:
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
