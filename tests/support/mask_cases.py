"""Scores and masks to try, and what must hold under them."""

import torch

import fisherprune as fp
from fisherprune.masks.masks import Masks


def scores_of(*shapes):
    """Return random scores by name."""
    return {f"layer{i}": torch.randn(shape) for i, shape in enumerate(shapes)}


def half_masks(model):
    """Return masks that keep half of the prunable weights, at random."""
    named = fp.prunable_parameters(model).items()
    return Masks({name: torch.rand_like(p) < 0.5 for name, p in named})


def assert_zero_where_pruned(model, masks):
    """See that pruned weights are zero, and none is -0."""
    for name, mask in masks.items():
        weights = model.get_parameter(name)
        assert not weights[~mask].any(), name
        assert not torch.signbit(weights[~mask]).any(), name
