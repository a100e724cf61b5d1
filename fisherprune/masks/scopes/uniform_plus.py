"""Scope "uniform_plus": one density behind a dense first layer."""

from __future__ import annotations

from fisherprune.masks.densities import first_dense
from fisherprune.masks.scopes.registry import Layers, register_scope


@register_scope("uniform_plus", "one density, the first layer dense")
def uniform_plus(layers: Layers, sparsity: float) -> dict[str, int]:
    """Keep the first layer whole and an equal share of every other one.

    Gale et al. 2019, "The State of Sparsity in Deep Neural Networks", arXiv 1902.09574,
    who keep at least a fifth of the classifier, too: it is not among the parameters
    that are pruned by default. Evci et al. 2020, RigL, arXiv 1911.11134, leave the
    first layer dense in their uniform networks. Here the sparsity is that of the whole,
    the first layer included.
    """
    keep, ones = layers.keep(sparsity), dict.fromkeys(layers.sizes, 1.0)
    return first_dense("uniform_plus", ones, layers.sizes, keep, layers.least)
