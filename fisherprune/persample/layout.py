"""Where the samples are in a tensor: found by comparing with a sample run alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The axis of a tensor that N samples share, k entries each.

    Of one sample, the whole tensor.

    Attributes:
        axis: of N * k entries.
        samples: N.
        entries: k.
        samples_first: whether a sample's k entries lie together, ``N * k``, or those of
            one position do, ``k * N``.
        is_sure: whether values tell which of both; not where all rows are the same.
    """

    axis: int
    samples: int
    entries: int = 1
    samples_first: bool = True
    is_sure: bool = True

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has as many entries there."""
        dims, size = tensor.dim(), self.samples * self.entries
        return self.samples == 1 or dims > self.axis and tensor.shape[self.axis] == size

    def apart(self, tensor: Tensor) -> Tensor:
        """Return ``[N, *shape]``, the shape being that of one sample's tensor."""
        if self.samples == 1:
            return tensor.unsqueeze(0)
        if self.entries == 1 and tensor.shape[self.axis] == self.samples:
            return tensor.unsqueeze(self.axis + 1).movedim(self.axis, 0)
        sizes = self.samples, self.entries
        split = tensor.unflatten(
            self.axis, sizes if self.samples_first else sizes[::-1]
        )
        return split.movedim(self.axis + (not self.samples_first), 0)

    def ends(self, tensor: Tensor) -> Tensor:
        """Return the first sample and the last of what ``apart`` has: ``[2, *shape]``.

        There are at least two.
        """
        plain = self.axis == 0 and self.entries == 1
        return (tensor if plain else self.apart(tensor))[:: self.samples - 1]

    def of_two(self, tensor: Tensor) -> Tensor:
        """Return the tensor that the first sample and the last have together.

        There are at least two.
        """
        ends = self.apart(tensor)[:: self.samples - 1]
        return replace(self, samples=2).together(ends)

    def sample_of_rows(self, like: Tensor) -> Tensor:
        """Return the sample of each element of a tensor that has the axis, flat."""
        if self.samples == 1:
            return torch.zeros_like(like, dtype=torch.int64).flatten()
        entries = torch.arange(self.samples * self.entries, device=like.device)
        first = self.samples_first
        samples = entries // self.entries if first else entries % self.samples
        samples = samples.view(-1, *(1 for _ in like.shape[self.axis + 1 :]))
        return samples.expand(like.shape).flatten()

    def of_sample(self, tensor: Tensor, number: int) -> Tensor:
        """Return what ``apart`` has of one sample."""
        if not self.samples_first:
            return self.apart(tensor)[number]
        start = number % self.samples * self.entries
        return tensor.narrow(self.axis, start, self.entries)

    def together(self, apart: Tensor) -> Tensor:
        """Return what ``apart`` takes apart."""
        if self.samples == 1:
            return apart.squeeze(0)
        split = apart.movedim(0, self.axis + (not self.samples_first))
        return split.flatten(self.axis, self.axis + 1)

    def leading(self, tensor: Tensor) -> Tensor:
        """Return ``[N, *]``: as ``apart``, without an axis of one entry."""
        if self.axis == 0 and tensor.shape[0] == self.samples:
            return tensor
        apart = self.apart(tensor)
        single = self.samples > 1 and self.entries == 1
        return apart.squeeze(1 + self.axis) if single else apart


class Scattered:
    """The rows of a call's result, each of any one sample.

    Attributes:
        samples: N.
        features: how many dimensions a row has; those before are of rows.
        numbers: ``[R]``, whose rows they are, as gradients tell; None: not yet.
        silent: ``[R]``, bool: those that had no gradient which could tell.
    """

    axis = 0

    def __init__(self, samples: int, features: int = 1) -> None:
        self.samples, self.features = samples, features
        self.numbers: Tensor | None = None
        self.silent: Tensor | None = None

    def are_told(self, grad: Tensor) -> bool:
        """Return whether it is known whose the rows of the result's gradient are."""
        return self.silent is not None and not self.rows(grad)[self.silent].any()

    def rows(self, tensor: Tensor) -> Tensor:
        """Return ``[R, *features]`` of the result, or of what has its dimensions."""
        return tensor.flatten(0, -1 - self.features)

    def told(self) -> Tensor:
        """Return whose rows they are."""
        assert self.numbers is not None
        return self.numbers


@dataclass(frozen=True)
class Alone:
    """What is known of a tensor of the sample that was run alone."""

    shape: tuple[int, ...]
    value: Tensor | None = None


class LayoutError(Exception):
    """Says why the samples are not found in a tensor."""


OTHER_ROWS = "the rows of a sample alone are not its rows in the batch"


def find_layout(
    alone: Alone,
    tensor: Tensor,
    samples: int,
    sample: int,
    differ: Callable[[Tensor, list[Tensor]], list[bool]],
    closest: Callable[[Tensor, list[Tensor]], tuple[int, bool]],
) -> Layout | None:
    """Find the axis of the samples in a tensor of a batch of at least two.

    Args:
        alone: of the tensor in the same call for one sample alone.
        tensor: of the batch.
        samples: N.
        sample: which of them ran alone.
        differ: which of others differ from a tensor by more than rounding.
        closest: which of others is closest to it, and whether it is by far.

    Returns:
        the layout; None where the tensor is none of the samples.

    Raises:
        LayoutError: where no axis has N times the entries, or their values are not
            those of the sample alone.
    """
    shape, batch = alone.shape, tuple(tensor.shape)
    if shape == batch:
        return None
    if shape[:1] == (1,) and batch == (samples, *shape[1:]):  # as most have it
        layout = Layout(0, samples)
        if alone.value is not None and alone.value.numel():
            if any(differ(alone.value, [layout.of_sample(tensor, sample)])):
                raise LayoutError(OTHER_ROWS)
        return layout
    if batch[:1] == (samples,):
        alone = _padded(alone, batch)
    shape = alone.shape
    axes = [a for a, (k, n) in enumerate(zip(shape, batch, strict=False)) if k != n]
    if (
        len(shape) != len(batch)
        or len(axes) != 1
        or batch[axes[0]] != samples * shape[axes[0]]
    ):
        raise LayoutError(
            f"one sample alone has the shape {list(shape)} where the batch of "
            f"{samples} has {list(batch)}"
        )
    (axis,) = axes
    layouts = [Layout(axis, samples, shape[axis])]
    if shape[axis] > 1:
        layouts.append(replace(layouts[0], samples_first=False))
    if alone.value is None or not prod(shape):
        return layouts[0]
    value = alone.value
    differing = differ(value, [each.of_sample(tensor, sample) for each in layouts])
    fitting = [each for each, no in zip(layouts, differing, strict=True) if not no]
    if len(fitting) == 2 and not torch.equal(*(each.apart(tensor) for each in layouts)):
        own, is_sure = closest(value, [e.of_sample(tensor, sample) for e in layouts])
        return replace(layouts[own], is_sure=is_sure)
    if not fitting:
        raise LayoutError(OTHER_ROWS)
    return fitting[0] if len(fitting) == 1 else replace(fitting[0], is_sure=False)


def _padded(alone: Alone, batch: tuple[int, ...]) -> Alone:
    """Add zeros at the end, as a batch pads the shorter ones of its sequences.

    That is where samples come first, and one sample alone has fewer positions.
    """
    shape, value = alone.shape, alone.value
    if value is None or len(shape) != len(batch) or shape[:1] != (1,):
        return alone
    missing = [n - k for k, n in zip(shape[1:], batch[1:], strict=True)]
    if not any(missing) or min(missing) < 0:
        return alone
    sides = [side for size in reversed(missing) for side in (0, size)]
    return Alone((1, *batch[1:]), F.pad(value, sides))
