"""TinyImageNet: 200 classes of ImageNet at 64 x 64 pixels, as its authors ship it.

    DATA_DIR/tiny-imagenet-200/wnids.txt                  the classes
    DATA_DIR/tiny-imagenet-200/train/WNID/images/*.JPEG   listed in WNID_boxes.txt
    DATA_DIR/tiny-imagenet-200/val/images/*.JPEG          listed in val_annotations.txt

The labels of its test images are not public. The 10,000 validation images are the test
part here, as in the literature.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from secrets import token_hex

import torch

from fisherprune.data.dataset import Augmentation, Dataset
from fisherprune.data.decoded import decoded
from fisherprune.data.download import (
    FAILURES,
    check_files,
    check_folder,
    no_data,
    patience,
)
from fisherprune.data.registry import Request, register_dataset
from fisherprune.errors import FisherpruneError, shown
from fisherprune.files import read_as
from fisherprune.packages import torchvision_for
from fisherprune.progress import bar

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
MEAN, STD = (0.480, 0.448, 0.397), (0.276, 0.269, 0.282)
"""Of the 100,000 training images."""
LabelledFile = tuple[os.DirEntry, int]


@register_dataset("tinyimagenet", image_size=64, batch_size=128, mirrored=True)
def load(request: Request) -> tuple[Dataset, Dataset]:
    """Return the 100,000 training and the 10,000 validation images, the test part.

    Downloaded and unpacked where the folder is missing; decoded once, see
    ``decoded.cache_file``. Crops are of images with a 16th of black on each side.

    Raises:
        FisherpruneError: where the data are neither there nor to be had, a file is
            missing, is in none of the lists, or is no image.
    """
    size, root = request.image_size, _root(request)
    wnids = sorted(line.strip() for line in _lines(root / "wnids.txt"))
    if len(set(wnids)) < max(len(wnids), 2):
        wanted = "different names of classes, at least 2"
        raise FisherpruneError(f"{root / 'wnids.txt'} must hold {wanted}, got {wnids}")
    files = {"train": _train(root / "train", wnids), "test": _val(root / "val", wnids)}
    images = decoded(root, files, size, request.quiet)
    train, test = (
        Dataset(
            images[part],
            torch.tensor([label for _, label in files[part]]),
            tuple(wnids),
            MEAN,
            STD,
            Augmentation(padding=size // 16, flip=True),
        )
        for part in files
    )
    return train, test


def _root(request: Request) -> Path:
    """Return the folder of the data, unpacked where it was missing."""
    root = request.data_dir / FOLDER
    check_folder(root)
    if not root.exists():
        archive = request.data_dir / ARCHIVE
        _download(archive, request)
        _unpack(archive, root, request.quiet)
    return root


def _download(archive: Path, request: Request) -> None:
    """Download the archive, unless it is there and whole."""
    utils = torchvision_for(request.name, "datasets.utils")
    mirror = request.mirror
    url = URL if mirror is None else f"{mirror.rstrip('/')}/{ARCHIVE}"
    check_files(archive)
    try:
        with patience():
            utils.download_url(url, archive.parent, archive.name, MD5)
    except FAILURES as error:
        folder = archive.parent / FOLDER
        raise no_data(request.name, folder, url, archive, MD5, error) from error


def _unpack(archive: Path, root: Path, quiet: bool) -> None:
    """Unpack the archive: ``root`` is there once it is whole."""
    temporary = root.with_name(f".{root.name}.{token_hex(4)}")
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in bar(packed.infolist(), "unpacking", quiet=quiet):
                packed.extract(member, temporary)
        (temporary / FOLDER).rename(root)
    except OSError:
        if not root.is_dir():  # another run was faster otherwise
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train(folder: Path, wnids: Iterable[str]) -> list[LabelledFile]:
    """Return the training images, class by class."""
    files = []
    for label, wnid in enumerate(wnids):
        source = folder / wnid / f"{wnid}_boxes.txt"
        names = [line.split("\t")[0] for line in _lines(source)]
        found = _listed(folder / wnid / "images", names, source)
        files += [(entry, label) for entry in found]
    return files


def _val(folder: Path, wnids: list[str]) -> list[LabelledFile]:
    """Return the validation images in the order of their names."""
    source = folder / "val_annotations.txt"
    labels: dict[str, int] = {}
    known = {wnid: label for label, wnid in enumerate(wnids)}
    for line in _lines(source):
        name, wnid = (*line.split("\t"), "")[:2]
        if wnid not in known:
            wanted = "an image and its class of wnids.txt"
            raise FisherpruneError(
                f"{source}: each line must hold {wanted}, got {shown(line)}"
            )
        labels[name] = known[wnid]
    found = _listed(folder / "images", sorted(labels), source)
    return [(entry, labels[entry.name]) for entry in found]


def _lines(path: Path) -> list[str]:
    """Return the lines of a list of the authors, at least one."""
    check_files(path)
    lines = read_as(path, str.splitlines, "must be a text file")
    if not lines:
        raise FisherpruneError(f"{path} must hold lines, got an empty file")
    return lines


def _listed(folder: Path, names: list[str], source: Path) -> list[os.DirEntry]:
    """Return the files of a folder that a list names: all there are but hidden ones."""
    if not folder.is_dir():
        raise FisherpruneError(f"tinyimagenet: {folder} must be a folder, got none")
    there = {e.name: e for e in os.scandir(folder) if not e.name.startswith(".")}
    for name in names:
        if name not in there or not there[name].is_file():
            raise FisherpruneError(
                f"tinyimagenet: {folder / name} must be an image file, as {source} "
                "says, got none"
            )
    for name in there.keys() - set(names):
        raise FisherpruneError(
            f"tinyimagenet: {source} must name every image, got {folder / name} too"
        )
    return [there[name] for name in names]
