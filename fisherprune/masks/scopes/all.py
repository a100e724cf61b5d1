"""Scope "global": scores of all layers compete together."""

from __future__ import annotations

from fisherprune.masks.densities import check_least
from fisherprune.masks.scopes.registry import Layers, register_scope


@register_scope("global", "one threshold")
def all_together(layers: Layers, sparsity: float) -> int:
    """Keep the largest scores, wherever they are."""
    keep = layers.keep(sparsity)
    check_least(layers.least, keep)
    return keep
