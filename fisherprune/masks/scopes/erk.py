"""Scope "erk": Erdos-Renyi-kernel densities."""

from __future__ import annotations

from fisherprune.masks.densities import erk_densities, keep_counts
from fisherprune.masks.scopes.registry import Layers, register_scope


@register_scope("erk", "Erdos-Renyi-kernel densities")
def erk(layers: Layers, sparsity: float) -> dict[str, int]:
    """Scale ``erk_densities`` to the sparsity of the whole."""
    keep = layers.keep(sparsity)
    return keep_counts(erk_densities(layers.shapes), layers.sizes, keep, layers.least)
