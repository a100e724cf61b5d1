"""CIFAR-10 and CIFAR-100, through torchvision, which checks every file's checksum."""

from __future__ import annotations

from typing import Any

import torch

from fisherprune.data.dataset import Augmentation, Dataset, resized
from fisherprune.data.download import (
    FAILURES,
    check_files,
    check_folder,
    no_data,
    patience,
)
from fisherprune.data.registry import Request, register_dataset
from fisherprune.packages import torchvision_for

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
    check_folder(folder)
    source = _source(name, request.mirror)
    check_files(folder / source.filename, *folder.glob(f"{source.base_folder}/*"))
    try:
        with patience():
            parts = [
                source(folder, train=part, download=part) for part in (True, False)
            ]
    except FAILURES as error:
        unpacked, archive = folder / source.base_folder, folder / source.filename
        raise no_data(
            name, unpacked, source.url, archive, source.tgz_md5, error
        ) from error
    train, test = (_dataset(name, part, request.image_size) for part in parts)
    return train, test


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
