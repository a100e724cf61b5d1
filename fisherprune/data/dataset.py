"""A labelled set of images that lives on the device as two tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError


@dataclass(frozen=True)
class Augmentation:
    """How training images of a dataset may be changed without changing their class."""

    padding: int
    """Pixels of black around the image before a random crop of the original size."""
    flip: bool
    """Whether a mirrored image is still of its class."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels, with what it takes to feed them to a network."""

    images: Tensor
    """uint8 ``[N, C, H, W]``, 0 is black."""
    labels: Tensor
    """int64 ``[N]``, indices into ``classes``."""
    classes: tuple[str, ...]
    """Names of the classes."""
    mean: tuple[float, ...]
    """Of each channel, of the training images, on the scale where white is 1."""
    std: tuple[float, ...]
    """Standard deviation, like ``mean``."""
    augmentation: Augmentation
    """What the images bear in training."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    def to(self, device: torch.device) -> Dataset:
        """Return the same data on ``device``."""
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels)

    def subset(self, indices: Tensor) -> Dataset:
        """Return the images of the given int64 indices, in their order."""
        indices = indices.to(self.images.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 images to float32 of mean 0 and variance 1 for each channel."""
        mean, std = self._scale
        return images.float().div_(255).sub_(mean).div_(std)

    @cached_property
    def _scale(self) -> tuple[Tensor, ...]:
        """``mean`` and ``std`` ``[C, 1, 1]`` where the images are.

        Made once: moving them to a GPU for each batch would wait for it each time.
        """
        return tuple(
            torch.tensor(values, device=self.images.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )

    def batches(self, size: int) -> Batches:
        """Return all images in order, as normalized batches with their labels."""
        return Batches(self, size)


class Batches:
    """Normalized images and labels, ``size`` at a time; may be passed over repeatedly.

    The last batch holds what is left. Nothing is kept between batches.
    """

    def __init__(self, dataset: Dataset, size: int) -> None:
        """Cut ``dataset`` into batches."""
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.dataset) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)``: float32 ``[B, C, H, W]`` and int64 ``[B]``."""
        data = self.dataset
        for images, labels in zip(
            data.images.split(self.size), data.labels.split(self.size), strict=True
        ):
            yield data.normalize(images), labels


def channel_statistics(
    images: Tensor,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 ``[N, C, H, W]``.

    Computed from the histogram of each channel, exact up to the last rounding; on the
    scale where white (255) is 1.

    Raises:
        FisherpruneError: where a channel is the same in all pixels of all images, so
            that nothing can be normalized by its deviation.
    """
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for c in range(images.shape[1]):
        channel = images[:, c].reshape(-1)
        share = torch.bincount(channel, minlength=256).double().cpu() / len(channel)
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum().sqrt()
        if std == 0:
            raise FisherpruneError(
                f"dataset: channel {c} must vary over the training images, got the "
                f"value {int(channel[0])} in every pixel"
            )
        means.append(mean.item())
        stds.append(std.item())
    return tuple(means), tuple(stds)


def resized(images: Tensor, size: int) -> Tensor:
    """Return uint8 ``[N, C, H, W]`` images at ``size`` x ``size``, bilinearly."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    return torch.nn.functional.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=True
    )
