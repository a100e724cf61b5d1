"""A volume convolution's weight gradients, as those of images that are its depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.factors import Factors

IMAGE_BYTES = 32 << 20
"""Bytes of images at a time: they hold each slice of a volume up to KZ times."""


@dataclass(frozen=True)
class Volume:
    """One use of a weight ``[O, C / groups, KZ, KY, KX]``.

    Attributes:
        input: ``[N * merged, C, D, H, W]``.
        grad: the gradient of the output, ``[N * merged, O, E, P, Q]``.
        conv: stride, padding and dilation, each of three numbers, and groups.
        merged: how many consecutive samples count as one.
    """

    input: Tensor
    grad: Tensor
    conv: dict[str, Any]
    merged: int = 1

    def __len__(self) -> int:
        """Return N."""
        return len(self.grad) // self.merged

    def samples(self, chosen: slice) -> Volume:
        """Return some of the samples."""
        input, grad = (
            t.unflatten(0, (-1, self.merged))[chosen].flatten(0, 1)
            for t in (self.input, self.grad)
        )
        return replace(self, input=input, grad=grad)

    def images(self, shape: tuple[int, ...]) -> Factors:
        """Return the same number of images a sample, whose gradients are to be added.

        Where the kernel is one voxel high and wide, the sample is one image, ``[C, D,
        H * W]``, and nothing is copied.
        """
        out, channels, depth, *plane = shape
        same = {"stride": (1, 1), "padding": (0, 0)}
        if plane == [1, 1] and all(self.conv[key][1:] == same[key] for key in same):
            sides = self.input.flatten(3), self.grad.flatten(3)
            return Factors(*sides, (out, channels, depth, 1), self._conv2d(slice(2)))
        kernel = (out, channels * depth, *plane)
        grad = self.grad.transpose(1, 2).flatten(0, 1)
        return Factors(self._slices(depth), grad, kernel, self._conv2d(slice(1, 3)))

    def _conv2d(self, axes: slice) -> dict[str, Any]:
        sizes = ("stride", "padding", "dilation")
        return {**self.conv, **{key: self.conv[key][axes] for key in sizes}}

    def _slices(self, depth: int) -> Tensor:
        """Return what the kernel sees at each output depth, ``[-1, C * KZ, H, W]``."""
        step, pad, spread = (self.conv[k][0] for k in ("stride", "padding", "dilation"))
        padded = F.pad(self.input, (0, 0, 0, 0, pad, pad)) if pad else self.input
        seen = padded.unfold(2, spread * (depth - 1) + 1, step)[..., ::spread]
        n, channels, outputs, height, width, _ = seen.shape
        ordered = seen.permute(0, 2, 1, 5, 3, 4)
        return ordered.reshape(n * outputs, channels * depth, height, width)


@dataclass(frozen=True)
class VolumeFactors:
    r"""A volume convolution's per-sample weight gradients, over all uses of the weight.

    At each output depth d, the convolution is that of the image whose channels are the
    slices which the kernel sees there:

    .. math:: G_n[o, (c, z), y, x] = \sum_d \sum_t grad_n[o, d, t] \,
        image_{n, d}[(c, z), h(t, y), w(t, x)]

    To ``ops.grad_moments``, the M images of a sample are a group, whose mean it
    squares: its sums are multiplied by M and M squared.
    """

    uses: tuple[Volume, ...]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.uses[0])

    def samples(self, chosen: slice) -> VolumeFactors:
        """Return the factors of some of the samples."""
        return replace(self, uses=tuple(use.samples(chosen) for use in self.uses))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of samples, some of them at a time.

        Groups that are too large for that, and uses that differ in size, are taken
        group by group.
        """
        whole = self._samples_at_once() // group_size * group_size
        if whole and all(_kind(use) == _kind(self.uses[0]) for use in self.uses):
            self._add_groups(sum, sum_sq, group_size, whole)
        else:
            for group in self._split(group_size):
                mean = group.total() / group_size
                sum += mean
                sum_sq.addcmul_(mean, mean)

    def _add_groups(
        self, sum: Tensor, sum_sq: Tensor, group_size: int, at_once: int
    ) -> None:
        means, squares, count = torch.zeros_like(sum), torch.zeros_like(sum), 1
        for part in self._split(at_once):
            images = part._images()
            count = len(images.grad) // len(part.uses[0])
            images.add_moments(means, squares, count * group_size)
        sum.add_(means, alpha=count)
        sum_sq.add_(squares, alpha=count**2)

    def total(self) -> Tensor:
        """Return the sum over the samples, of shape ``self.shape``."""
        total = self.uses[0].grad.new_zeros(self.shape, dtype=torch.float32)
        for use in self.uses:
            whole = VolumeFactors((use,), self.shape)
            for part in whole._split(max(1, whole._samples_at_once())):
                mean, ignored = torch.zeros_like(total), torch.zeros_like(total)
                images = part._images()
                images.add_moments(mean, ignored, len(images.grad))
                total.add_(mean, alpha=len(images.grad))
        return total

    def per_sample(self) -> Tensor:
        """Return the per-sample gradients multiplied out, ``[N, *shape]``, float32."""
        rows = self.uses[0].grad.new_empty(
            (len(self.uses[0]), *self.shape), dtype=torch.float32
        )
        for row, sample in zip(rows, self._split(1), strict=True):
            row.copy_(sample.total())
        return rows

    def join(self, others: Sequence[VolumeFactors]) -> VolumeFactors:
        """Join uses in one forward pass: gradients add up before the square."""
        return replace(
            self, uses=(*self.uses, *(use for each in others for use in each.uses))
        )

    def merged(self, k: int) -> VolumeFactors:
        """Let k consecutive samples become one, whose gradient is the sum of theirs."""
        uses = (replace(use, merged=use.merged * k) for use in self.uses)
        return replace(self, uses=tuple(uses))

    def _split(self, size: int) -> list[VolumeFactors]:
        starts = range(0, len(self.uses[0]), size)
        return [self.samples(slice(start, start + size)) for start in starts]

    def _samples_at_once(self) -> int:
        values = [self.shape[2] * u.input.numel() + u.grad.numel() for u in self.uses]
        return IMAGE_BYTES * len(self.uses[0]) // max(1, 4 * sum(values))

    def _images(self) -> Factors:
        """Return the images of all uses, those of a sample one after the other."""
        parts = [use.images(self.shape) for use in self.uses]
        if len(parts) == 1:
            return parts[0]
        n = len(self.uses[0])
        input, grad = (
            torch.cat([getattr(p, side).unflatten(0, (n, -1)) for p in parts], 1)
            for side in ("input", "grad")
        )
        return replace(parts[0], input=input.flatten(0, 1), grad=grad.flatten(0, 1))


def _kind(use: Volume) -> tuple[Any, ...]:
    return use.conv, use.input.shape[1:], use.input.dtype
