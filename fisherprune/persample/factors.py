"""Per-sample gradients of weight matrices and kernels, not multiplied out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune import ops
from fisherprune.persample.contributions import STREAM_BYTES, Contribution, Rows


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

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.grad)

    def samples(self, chosen: slice) -> Factors:
        """Return the factors of some of the samples."""
        return replace(self, input=self.input[chosen], grad=self.grad[chosen])

    def balanced(self) -> Factors:
        """Return the same gradients, of factors whose largest entries are alike.

        The kernels square each factor by itself where that is quicker, so one of 1e30
        and one of 1e-30 would be infinity times zero.
        """
        pair = self.input, self.grad
        input, grad = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
        powers = [math.frexp(float(t.abs().max()))[1] for t in (input, grad)]
        half = max(-120, min(120, (powers[0] - powers[1]) // 2))
        return replace(self, input=input * 2.0**-half, grad=grad * 2.0**half)

    def merged(self, k: int) -> Contribution:
        """Make one sample of k consecutive ones: positions, or images of one use."""
        input, grad = (t.unflatten(0, (-1, k)) for t in (self.input, self.grad))
        if self.conv is None:
            return replace(self, input=input, grad=grad)
        uses = (replace(self, input=input[:, j], grad=grad[:, j]) for j in range(k))
        return JoinedFactors(tuple(uses))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of samples with ``ops.grad_moments``."""
        accumulators = (
            t if t.shape == self.shape else t.view(self.shape) for t in (sum, sum_sq)
        )
        input, grad = (
            t.float() if t.dtype == torch.float64 else t
            for t in (self.input, self.grad)
        )
        ops.grad_moments(
            input, grad, *accumulators, group_size=group_size, **self.conv or {}
        )

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        flat = self.unfolded()
        groups = flat.conv["groups"] if flat.conv else 1
        input, grad = (
            t.flatten(2).unflatten(1, (groups, -1)).float()
            for t in (flat.input, flat.grad)
        )
        rows = torch.einsum("ngot,ngit->ngoi", grad, input)
        return rows.reshape(len(self), *self.shape)

    def total(self) -> Tensor:
        """Return the sum over the samples, of shape ``self.shape``."""
        sum = self.grad.new_zeros(self.shape, dtype=torch.float32)
        self.add_moments(sum, torch.zeros_like(sum), 1)
        return sum

    def join(self, others: Sequence[Factors | JoinedFactors]) -> JoinedFactors:
        """Join the positions of all uses: a weight's gradient sums over them."""
        return JoinedFactors((self,)).join(others)

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


@dataclass(frozen=True)
class Blocks:
    """Factors of a weight ``[B, in, out]``, a matrix for each of B.

    Attributes:
        factors: those of a convolution of B groups that has the same numbers.
        shape: the weight's.
    """

    factors: Factors
    shape: tuple[int, ...]

    @staticmethod
    def of(input: Tensor, grad: Tensor, shape: tuple[int, ...]) -> Blocks:
        """Return those of inputs ``[N, B, T, in]``, gradients ``[N, B, T, out]``."""
        count, width, out = shape
        input, grad = (t.mT.flatten(1, 2).unsqueeze(-1) for t in (input, grad))
        one = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        conv = {**one, "groups": count}
        return Blocks(Factors(grad, input, (count * width, out, 1, 1), conv), shape)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.factors)

    def samples(self, chosen: slice) -> Blocks:
        """Return the factors of some of the samples."""
        return replace(self, factors=self.factors.samples(chosen))

    def balanced(self) -> Blocks:
        """Return the same gradients, as ``Factors.balanced`` does."""
        return replace(self, factors=self.factors.balanced())

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of samples."""
        self.factors.add_moments(sum, sum_sq, group_size)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        return self.factors.per_sample().view(-1, *self.shape)


@dataclass(frozen=True)
class JoinedFactors:
    """Several uses of a weight, whose positions are joined some samples at a time.

    Like convolutions are stacked as images, others and pairs are unfolded into patches.
    """

    uses: tuple[Factors, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.uses[0])

    def samples(self, chosen: slice) -> JoinedFactors:
        """Return the factors of some of the samples."""
        return JoinedFactors(tuple(use.samples(chosen) for use in self.uses))

    def join(self, others: Sequence[Factors | JoinedFactors]) -> JoinedFactors:
        """Join all uses."""
        uses = (o.uses if isinstance(o, JoinedFactors) else (o,) for o in others)
        return JoinedFactors(sum(uses, self.uses))

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of samples; unfolded, they are the kernel's size."""
        samples = len(self)
        bytes_per_group = self._patch_bytes() * group_size // max(1, samples)
        at_once = max(1, STREAM_BYTES // max(1, bytes_per_group)) * group_size
        if len(self.uses) == 2:
            at_once = samples
        for start in range(0, samples, at_once):
            some = self.samples(slice(start, start + at_once))
            some._joined().add_moments(sum, sum_sq, group_size)

    def per_sample(self) -> Tensor:
        """Multiply out: ``[N, *shape]``, float32."""
        return Rows.summed(use.per_sample() for use in self.uses)

    def total(self) -> Tensor:
        """Return the sum over the samples, of the weight's shape."""
        return Rows.summed(use.total() for use in self.uses)

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
