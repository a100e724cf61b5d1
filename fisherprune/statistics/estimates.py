"""Estimates from random draws, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherprune.parameters import check_finite


@dataclass(frozen=True, eq=False)
class Estimate:
    r"""The mean over K draws, and how far it may be from what it estimates.

    Attributes:
        mean: :math:`\bar x = \frac1K \sum_k x_k` by parameter name, float32.
        standard_error: :math:`\sqrt{\frac{1}{K (K - 1)} \sum_k (x_k - \bar x)^2}` by
            parameter name, float32, for each element; itself an estimate, from K draws.
        draws: the number K of draws.
    """

    mean: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    draws: int


def estimate_of(
    draws: Sequence[dict[str, Tensor]], what: str, factor: float = 1.0
) -> Estimate:
    """Return the mean of draws times a factor, in float64, and its standard error.

    Raises:
        FisherpruneError: where it is not finite; the error calls it ``what``.
    """
    means, errors, count = {}, {}, len(draws)
    for name in draws[0]:
        each = torch.stack([draw[name].double() * factor for draw in draws])
        means[name] = each.mean(0).float()
        errors[name] = (each.std(0) / math.sqrt(count)).float()
    check_finite(means, what)
    return Estimate(means, errors, count)
