"""Scope "erk_plus": Erdos-Renyi-kernel densities behind a dense first layer."""

from __future__ import annotations

from fisherprune.masks.densities import erk_densities, first_dense
from fisherprune.masks.scopes.registry import Layers, register_scope


@register_scope("erk_plus", "erk, the first layer dense")
def erk_plus(layers: Layers, sparsity: float) -> dict[str, int]:
    """Keep the first layer whole and scale ``erk_densities`` to what is left.

    Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning", arXiv
    2202.02643, call ERK with a dense *classifier* ERK+. The classifier is not among the
    parameters that are pruned by default, so "erk" has that already.
    """
    keep = layers.keep(sparsity)
    relative = erk_densities(layers.shapes)
    return first_dense("erk_plus", relative, layers.sizes, keep, layers.least)
