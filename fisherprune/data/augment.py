"""Training batches: shuffled, cropped and flipped on the device, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.data.dataset import Augmentation, Dataset


def crop_and_flip(
    images: Tensor, shifts: Tensor, flips: Tensor, padding: int
) -> Tensor:
    """Surround images with black, cut each out at its shift, mirror the chosen ones.

    Args:
        images: ``[B, C, H, W]``, 0 is black.
        shifts: int64 ``[2, B]``, first row and column of each crop in the padded image,
            in ``[0, 2 * padding]``; ``padding`` leaves the image where it is.
        flips: bool ``[B]``, True mirrors left and right, after the crop.
        padding: pixels of black on each side.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of every crop
    item = torch.arange(len(images), device=images.device)
    cropped = crops[item, :, shifts[0], shifts[1]]
    return torch.where(flips[:, None, None, None], cropped.flip(3), cropped)


def draw(
    count: int, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a crop for each image, and a flip for every other where images bear it.

    Returns:
        ``shifts`` and ``flips`` of ``crop_and_flip``, on the CPU. As many numbers are
        drawn whatever the augmentation.
    """
    span = 2 * augmentation.padding + 1
    shifts = torch.randint(span, (2, count), generator=generator)
    flips = torch.randint(2, (count,), generator=generator).bool()
    if not augmentation.flip:
        flips.zero_()
    return shifts, flips


def batch_sizes(total: int, size: int) -> list[int]:
    """Return the sizes of the batches of an epoch; their sum is ``total``.

    The last one is what is left, except that a single image joins the batch before:
    BatchNorm in training has no variance of one value.
    """
    sizes = [size] * (total // size) + ([total % size] if total % size else [])
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


class TrainingBatches:
    """An epoch of normalized batches; every pass shuffles and augments anew."""

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        order: torch.Generator,
        chance: torch.Generator,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Shuffle by ``order``, augment by ``chance``: two CPU generators."""
        self.dataset, self.order, self.chance = dataset, order, chance
        self.memory_format = memory_format
        self.sizes = batch_sizes(len(dataset), size)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)``: float32 ``[B, C, H, W]`` and int64 ``[B]``.

        The draws of the whole epoch go to the device at once: no step waits for it.
        """
        data = self.dataset
        order = torch.randperm(len(data), generator=self.order)
        drawn = (order, *draw(len(data), data.augmentation, self.chance))
        device = data.images.device
        parts = (values.to(device).split(self.sizes, -1) for values in drawn)
        for indices, shifts, flips in zip(*parts, strict=True):
            images = crop_and_flip(
                data.images[indices], shifts, flips, data.augmentation.padding
            ).contiguous(memory_format=self.memory_format)
            yield data.normalize(images), data.labels[indices]
