"""What one use of a parameter adds to its per-sample gradients, not yet multiplied out.

``Factors`` are those of weight matrices and kernels, ``Rows`` of any other parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune import ops

if TYPE_CHECKING:
    from typing_extensions import Self


class Gradients(Protocol):
    """The per-sample gradients of one parameter."""

    def samples(self, chosen: slice) -> Self:
        """Return those of some of the samples."""

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate the means of a whole number of groups, and their squares."""


class Contribution(Gradients, Protocol):
    """The part of them that one use of the parameter contributes."""

    def total(self) -> Tensor:
        """Return the sum over the samples, the ordinary gradient."""

    def join(self, others: Sequence[Self]) -> Gradients:
        """Join uses in one forward pass: gradients add up before the square."""


@dataclass(frozen=True)
class Factors:
    """A weight's per-sample gradients as layer input and output gradient.

    For a convolution ``input`` is ``[N, C, H, W]``, ``grad`` is ``[N, O, P, Q]`` and
    ``conv`` holds stride, padding, dilation and groups; for a linear layer they are
    ``[N, *, in]`` and ``[N, *, out]`` and ``conv`` is None. ``shape`` is the weight's.
    """

    input: Tensor
    grad: Tensor
    shape: tuple[int, ...]
    conv: dict[str, Any] | None = None

    def samples(self, chosen: slice) -> Factors:
        """Return the factors of some of the samples."""
        return replace(self, input=self.input[chosen], grad=self.grad[chosen])

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of samples with ``ops.grad_moments``."""
        accumulators = sum.view(self.shape), sum_sq.view(self.shape)
        conv = self.conv or {}
        ops.grad_moments(
            self.input, self.grad, *accumulators, group_size=group_size, **conv
        )

    def total(self) -> Tensor:
        """Return the sum over the samples, of shape ``self.shape``."""
        sum = self.grad.new_zeros(self.shape, dtype=torch.float32)
        self.add_moments(sum, torch.zeros_like(sum), 1)
        return sum

    def join(self, others: Sequence[Factors]) -> JoinedFactors:
        """Join the positions of all uses: a weight's gradient sums over them."""
        return JoinedFactors((self, *others))

    def unfolded(self) -> Factors:
        """Rewrite as the 1x1 convolution over patches, ``[N, C * Y * X, T, 1]``."""
        if self.conv is None:
            input, grad = (_positions_last(t) for t in (self.input, self.grad))
            groups = 1
        else:
            size = {key: self.conv[key] for key in ("dilation", "padding", "stride")}
            input = F.unfold(self.input, self.shape[2:], **size)
            grad, groups = self.grad.flatten(2), self.conv["groups"]
        shape = (self.shape[0], math.prod(self.shape[1:]), 1, 1)
        one = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        conv = {**one, "groups": groups}
        return Factors(input.unsqueeze(-1), grad.unsqueeze(-1), shape, conv)


JOINED_BYTES = 32 << 20
"""Bytes of joined patches at a time, of more than two uses: unfolded, they are many."""


@dataclass(frozen=True)
class JoinedFactors:
    """Several uses of a weight, whose positions are joined some samples at a time.

    Like convolutions are stacked as images, others and pairs are unfolded into patches.
    """

    uses: tuple[Factors, ...]

    def samples(self, chosen: slice) -> JoinedFactors:
        """Return the factors of some of the samples."""
        return JoinedFactors(tuple(use.samples(chosen) for use in self.uses))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of samples; unfolded, they are the kernel's size."""
        samples = len(self.uses[0].grad)
        bytes_per_group = self._patch_bytes() * group_size // max(1, samples)
        at_once = max(1, JOINED_BYTES // max(1, bytes_per_group)) * group_size
        if len(self.uses) == 2:
            at_once = samples
        for start in range(0, samples, at_once):
            some = self.samples(slice(start, start + at_once))
            some._joined().add_moments(sum, sum_sq, group_size)

    def _patch_bytes(self) -> int:
        """Return the bytes of all that is joined, unfolded: a patch a position."""
        first = self.uses[0]
        out, *patch = first.shape
        groups = first.conv["groups"] if first.conv else 1
        positions = sum(use.grad.numel() // out for use in self.uses)
        return 4 * positions * (out + groups * math.prod(patch))

    def _joined(self) -> Factors:
        kinds = [(use.conv, use.input.shape, use.input.dtype) for use in self.uses]
        if len(kinds) > 2 and kinds[0][0] and all(kind == kinds[0] for kind in kinds):
            return self._stacked()
        unfolded = [use.unfolded() for use in self.uses]
        input, grad = (
            torch.cat([getattr(use, side) for use in unfolded], 2)
            for side in ("input", "grad")
        )
        return replace(unfolded[0], input=input, grad=grad)

    def _stacked(self) -> Factors:
        """Stack the images of like convolutions: k * k times smaller than patches.

        Each image and its padding take a whole number of steps. Output rows whose
        window is not within one image have the gradient zero.
        """
        first = self.uses[0]
        assert first.conv is not None
        (step, _), (top, side) = first.conv["stride"], first.conv["padding"]
        rows = -(-(first.input.shape[2] + 2 * top) // step)  # steps of one image
        images = _stack([use.input for use in self.uses], top, rows * step)
        grads = _stack([use.grad for use in self.uses], 0, rows)
        window = first.conv["dilation"][0] * (first.shape[2] - 1) + 1
        outputs = (images.shape[2] - window) // step + 1
        conv = {**first.conv, "padding": (0, side)}
        return Factors(images, grads[:, :, :outputs], first.shape, conv)


@dataclass(frozen=True)
class Rows:
    """The per-sample gradients themselves, ``[N, *shape]``: for small parameters."""

    rows: Tensor

    def samples(self, chosen: slice) -> Rows:
        """Return the rows of some of the samples."""
        return Rows(self.rows[chosen])

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over a whole number of groups of samples."""
        means = self.rows.unflatten(0, (-1, group_size)).mean(1)
        sum += means.sum(0)
        sum_sq += means.square().sum(0)

    def total(self) -> Tensor:
        """Return the sum over the samples, of the parameter's shape."""
        return self.rows.sum(0)

    def join(self, others: Sequence[Rows]) -> Rows:
        """Add the gradients of all uses."""
        return Rows(reduce(torch.add, (each.rows for each in others), self.rows))


def _stack(images: Sequence[Tensor], top: int, rows: int) -> Tensor:
    """``[N, C, H, W]`` each -> ``[N, C, len(images) * rows, W]``, zeros around each."""
    n, channels, height, width = images[0].shape
    stack = images[0].new_zeros((n, channels, len(images), rows, width))
    for i, image in enumerate(images):
        stack[:, :, i, top : top + height] = image
    return stack.flatten(2, 3)


def _positions_last(x: Tensor) -> Tensor:
    """``[N, *, features] -> [N, features, T]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).mT


def summed_positions(grad: Tensor) -> Rows:
    """Per-sample bias gradients of a channels-second layer: ``[N, C, *] -> [N, C]``."""
    return Rows(grad.float().reshape(*grad.shape[:2], -1).sum(-1))
