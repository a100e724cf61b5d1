"""Scope "layer": the same sparsity in each layer."""

from __future__ import annotations

from fisherprune.masks.counts import keep_count
from fisherprune.masks.densities import keep_counts
from fisherprune.masks.scopes.registry import Layers, register_scope


@register_scope("layer", "the same sparsity in each", apart=True)
def same_sparsity(layers: Layers, sparsity: float) -> dict[str, int]:
    """Keep ``keep_count`` weights of each layer, so at least one.

    Where a layer must keep more, ``layers.least``, the others share what is left of the
    sum at one density.
    """
    sizes = layers.sizes
    counts = {name: keep_count(size, sparsity) for name, size in sizes.items()}
    if all(counts[name] >= layers.least[name] for name in sizes):
        return counts
    ones, keep = dict.fromkeys(sizes, 1.0), sum(counts.values())
    return keep_counts(ones, sizes, keep, layers.least)
