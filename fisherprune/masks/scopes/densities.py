"""Scope "densities": relative densities that are given."""

from __future__ import annotations

from fisherprune.masks.densities import checked_densities, keep_counts
from fisherprune.masks.scopes.registry import Layers, register_scope
from fisherprune.parameters import fitted_names


@register_scope("densities", "given ones, scaled to the sparsity", given=True)
def densities(layers: Layers, sparsity: float) -> dict[str, int]:
    """Scale the given densities to the sparsity of the whole."""
    given = checked_densities(layers.densities)
    if fit := fitted_names(given, layers.sizes):  # one of the models was wrapped
        given = {fit[name]: density for name, density in given.items()}
    return keep_counts(given, layers.sizes, layers.keep(sparsity), layers.least)
