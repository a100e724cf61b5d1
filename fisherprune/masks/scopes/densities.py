"""Scope "densities": relative densities that are given."""

from __future__ import annotations

from fisherprune.masks.densities import checked_densities, keep_counts
from fisherprune.masks.scopes.registry import Layers, register_scope
from fisherprune.parameters import fitted_names


def _given(layers: Layers) -> dict[str, float]:
    """Return the densities by the names of the layers."""
    given = checked_densities(layers.densities)
    if fit := fitted_names(given, layers.sizes):  # one of the models was wrapped
        given = {fit[name]: density for name, density in given.items()}
    return given


def _most(layers: Layers) -> int:
    given = _given(layers)
    return sum(size for name, size in layers.sizes.items() if given[name] > 0)


@register_scope(
    "densities", "given ones, scaled to the sparsity", given=True, most=_most
)
def densities(layers: Layers, sparsity: float) -> dict[str, int]:
    """Scale the given densities to the sparsity of the whole."""
    return keep_counts(
        _given(layers), layers.sizes, layers.keep(sparsity), layers.least
    )
