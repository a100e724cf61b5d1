"""The samples of ``fisherprune fisher``: images in class folders, or a batch file."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fisherprune.data import Augmentation, Dataset, stratified_choice
from fisherprune.data.decoded import decoded
from fisherprune.data.folder import class_files
from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.fisher.tensors import read_tensors
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.key import hash_of
from fisherprune.streams import stream

KEYS = {"inputs", "labels"}


@dataclass(frozen=True)
class Samples:
    """What moments are computed on."""

    batches: Batches
    shape: tuple[int, ...]
    """Of one input, ``[C, S, S]``."""
    classes: int
    """As many as the labels need."""
    about: dict[str, object]
    """What a file of moments says of them."""


def load_samples(options: Namespace) -> Samples:
    """Load what the options ask for, in an order that depends on the seed alone.

    Raises:
        FisherpruneError: where data are missing, broken or of another form.
    """
    found = _folder(options) if options.images else _file(options)
    inputs, labels, classes, about = found
    count = len(labels) if options.samples is None else options.samples
    generator = stream(options.seed, "score_samples")
    chosen = stratified_choice(labels, count, generator, name="samples")
    inputs, labels = inputs[chosen], labels[chosen]
    about |= {"samples": count, "fingerprint": hash_of(inputs, labels)[:32]}
    size = options.batch_size
    batches: Batches = list(zip(inputs.split(size), labels.split(size), strict=True))
    if options.images:  # normalized batch by batch: as floats they take four times more
        scale = tuple(options.mean), tuple(options.std)
        dataset = Dataset(inputs, labels, (), *scale, Augmentation(0, False))
        batches = dataset.batches(size)
    return Samples(batches, tuple(inputs.shape[1:]), classes, about)


def _folder(options: Namespace) -> tuple[Tensor, Tensor, int, dict[str, object]]:
    files, classes = class_files(options.images)
    parts = {"images": files}
    images = decoded(options.images, parts, options.image_size, quiet=False)["images"]
    labels = torch.tensor([label for _, label in files])
    about = {
        "folder": options.images.resolve().name,
        "classes": list(classes),
        "image_size": options.image_size,
        "mean": options.mean,
        "std": options.std,
    }
    return images, labels, len(classes), about


def _file(options: Namespace) -> tuple[Tensor, Tensor, int, dict[str, object]]:
    path: Path = options.data
    content = read_tensors(path, "data")
    if {*content} != KEYS:
        wanted = "a file of the tensors inputs and labels"
        raise FieldError(f"data {path}", wanted, shown(sorted(content)))
    inputs, labels = content["inputs"], content["labels"]
    _check(path, inputs, labels)
    about: dict[str, object] = {"file": path.name}
    return inputs, labels.long(), int(labels.max()) + 1, about


def _check(path: Path, inputs: Tensor, labels: Tensor) -> None:
    square = inputs.dim() == 4 and inputs.shape[2] == inputs.shape[3]
    if not (square and inputs.is_floating_point() and len(inputs)):
        got = f"{_kind(inputs)} {list(inputs.shape)}"
        wanted = "floating-point images [N, C, S, S], normalized as for the model"
        raise FieldError(f"data {path}: inputs", wanted, got)
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if not (whole and labels.shape == inputs.shape[:1]):
        got = f"{_kind(labels)} {list(labels.shape)}"
        raise FieldError(f"data {path}: labels", f"integers [{len(inputs)}]", got)
    if labels.min() < 0:
        raise FisherpruneError(f"data {path}: labels must be classes, counted from 0")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_scale(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what pixels can't be normalized by."""
    if not all(map(math.isfinite, mean)):
        raise FieldError("mean", "finite numbers", list(mean))
    if not all(0 < each < math.inf for each in std):
        raise FieldError("std", "finite numbers above 0", list(std))
