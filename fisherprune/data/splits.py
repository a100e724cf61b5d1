"""Stratified parts of a dataset: every class keeps its share in each part."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherprune.data.dataset import Dataset
from fisherprune.errors import FisherpruneError

VALIDATION_SHARE = 0.2
SPLIT_SEED = 42
"""The split is the same in every run, whatever its seed."""


def train_validation_split(
    dataset: Dataset, share: float = VALIDATION_SHARE
) -> tuple[Dataset, Dataset]:
    """Split off the validation images, by ``split``.

    Args:
        dataset: all training images.
        share: of the images for validation, in [0, 1); 0 leaves ``dataset`` as it is
            and returns no image beside it.

    Raises:
        FisherpruneError: where the images are too few to give both parts some of each
            class.
    """
    if share == 0:
        return dataset, dataset.subset(torch.arange(0))
    counts = torch.bincount(dataset.labels, minlength=len(dataset.classes)).tolist()
    fewest = min(range(len(counts)), key=counts.__getitem__)
    if counts[fewest] < 2:
        raise FisherpruneError(
            "train/validation split: each class must have at least 2 training images, "
            f"got {counts[fewest]} of {dataset.classes[fewest]!r}"
        )
    try:
        return split(dataset, share)
    except ValueError as error:
        raise FisherpruneError(
            f"train/validation split: {len(dataset)} training images are too few for "
            f"{len(dataset.classes)} classes: {error}"
        ) from error


def split(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Split by scikit-learn's ``train_test_split``, stratified, seed 42.

    Raises:
        ValueError: where the images are too few.
    """
    from sklearn.model_selection import train_test_split

    parts = train_test_split(
        torch.arange(len(dataset)).numpy(),
        test_size=share,
        stratify=dataset.labels.cpu().numpy(),
        random_state=SPLIT_SEED,
    )
    first, second = (dataset.subset(torch.from_numpy(part)) for part in parts)
    return first, second


def stratified_choice(
    labels: Tensor, size: int, generator: torch.Generator, *, name: str
) -> Tensor:
    """Choose ``size`` of the indices of ``labels`` in a random order, by class shares.

    Each class gets the integer part of its share ``size * count / N``; what is left
    goes one by one to the largest remainders, of equal ones to the first class.

    Args:
        labels: int64 ``[N]``.
        size: how many to choose, in [1, N].
        generator: a CPU generator, the only source of chance.
        name: what the errors call ``size``.

    Returns:
        int64 ``[size]`` on the CPU.

    Raises:
        FisherpruneError: where ``size`` is not in [1, N].
    """
    labels = labels.cpu()
    if size < 1:
        raise FisherpruneError(f"{name} must be at least 1, got {size}")
    if size > len(labels):
        raise FisherpruneError(
            f"{name} must be at most the {len(labels)} training images there are, "
            f"got {size}"
        )
    counts = torch.bincount(labels).tolist()
    quotas = [size * count // len(labels) for count in counts]
    by_remainder = sorted(
        range(len(counts)), key=lambda c: -(size * counts[c] % len(labels))
    )
    for c in by_remainder[: size - sum(quotas)]:
        quotas[c] += 1
    chosen = []
    for c, quota in enumerate(quotas):
        members = (labels == c).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:quota]])
    return torch.cat(chosen)[torch.randperm(size, generator=generator)]
