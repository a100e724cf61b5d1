"""Which layers are faster sparse than dense."""

from __future__ import annotations

from torch import nn

DENSE_ABOVE = 0.25
"""Density above which a layer stays dense."""


def pays(module: nn.Module, density: float) -> bool:
    """Return whether a layer with that share of kept weights is faster sparse."""
    return density <= DENSE_ABOVE
