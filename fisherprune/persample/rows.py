"""The check that rows are of the samples of which they seem to be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherprune.persample.layout import Scattered

SEEMS_OTHER = "a row that seems to be of one sample is of another"
REACHES_OTHER = "gradients of a sample's loss reach rows of other samples"
BASE = 8
"""Samples whose factors differ in one pass: up to 2^7, which float16 can hold."""


class RowCheck:
    """Gives samples factors of their own, and looks for them in gradients.

    Factors are powers of two, which round nothing: where the loss of a sample has such
    a factor, the gradients at its rows have it as well, and those of others have not.

    Args:
        samples: N.
    """

    reason = SEEMS_OTHER

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.factors = torch.ones(samples)
        self.unit = 0  # of the digit of a sample's number that is its factor
        self.norms: dict[object, Tensor] = {}  # of each call where all factors are 1

    def factors_in_turn(self) -> Iterator[Tensor]:
        """Yield the factors ``[N]`` of passes, which differ in one for any two samples.

        Those of the first pass are 1.
        """
        yield self.factors
        numbers, self.unit = torch.arange(self.samples), 1
        while self.unit < self.samples:
            self.factors = 2.0 ** (numbers // self.unit % BASE)
            yield self.factors
            self.unit *= BASE

    def differs(self, call: object, grads: Tensor) -> bool:
        """Return whether gradients of samples have other factors than theirs.

        Args:
            call: in each pass the same.
            grads: ``[N, *]``, as the samples seem to be.
        """
        rows, factors = grads.flatten(1), self.factors.to(grads.device)
        # Squares of what float32 can hold may be too small for it.
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) / factors
        wanted = self.norms.setdefault(call, norms)
        # What is nearly zero may be rounding errors of other samples.
        tolerance = 1e-3 * wanted + 1e-5 * wanted.max()
        return bool(((norms - wanted).abs() > tolerance).any())

    def trace(self, rows: Scattered, grads: Tensor) -> bool:
        """Find whose rows of any samples are; return whether each is of one.

        Args:
            rows: that are to be known.
            grads: ``[R, *]``, theirs.
        """
        flat = grads.flatten(1) if grads.dim() > 1 else grads.unsqueeze(1)
        norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
        if not self.unit or not len(norms):
            rows.numbers = torch.zeros(
                len(norms), dtype=torch.long, device=norms.device
            )
            self.norms[rows], rows.silent = norms, norms == 0
            return True
        ones = self.norms[rows]
        digits = (norms / ones).log2().round().nan_to_num().clamp(0, BASE - 1)
        wanted = ones * 2**digits
        numbers = rows.told() + digits.long() * self.unit
        rows.numbers = numbers.clamp_max(self.samples - 1)
        # What is nearly zero may be rounding errors of several samples.
        tolerance = 1e-3 * wanted + 1e-5 * wanted.max()
        is_known = ((norms - wanted).abs() <= tolerance) & (
            (numbers < self.samples) | (norms <= tolerance)
        )
        return bool(is_known.all())


class ReachCheck(RowCheck):
    """Sees whether gradients of every second sample's loss reach rows of others.

    In one pass: the losses of the others have the factor 0, so their rows have zeros.
    Of two samples it may be either, in two passes.

    Args:
        samples: N.

    Attributes:
        reached: of each call, whether a gradient that reaches another row is not zero.
    """

    reason = REACHES_OTHER

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.silent = slice(None, None, 2)  # samples whose factor is 0
        self.reached: list[Tensor] = []

    def factors_in_turn(self) -> Iterator[Tensor]:
        """Yield the factors ``[N]`` of the passes."""
        for first in (0, 1) if self.samples == 2 else (0,):
            self.silent = slice(first, None, 2)
            factors = torch.ones(self.samples)
            factors[self.silent] = 0
            yield factors

    def trace(self, rows: Scattered, grads: Tensor) -> bool:
        """Return True: rows of any samples reach none that are not theirs."""
        return True

    def differs(self, call: object, grads: Tensor) -> bool:
        """Note gradients ``[N, *]`` of samples, which are read later all at once."""
        self.reached.append(grads[self.silent].any())
        return False


class LargeReachCheck(ReachCheck):
    """The same, where what is reached is more than rounding errors."""

    def differs(self, call: object, grads: Tensor) -> bool:
        """Return whether gradients ``[N, *]`` of samples are others than theirs."""
        norms = torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=torch.float64)
        return bool((norms[self.silent] > 1e-6 * norms.max()).any())
