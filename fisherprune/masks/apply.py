"""Masks on a model: which of its weights they prune, and what is left of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError, LayerCollapseWarning
from fisherprune.masks.compare import count
from fisherprune.parameters import checked_model, fitted_names, plain_parameters
from fisherprune.shards import local, split_like


def pruned_weights(
    masks: Mapping[str, Tensor], model: nn.Module
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Pair the model's parameters with the inverted masks on their devices, by name.

    Of parameters in shards, the masks are of this rank's part.

    Raises:
        FisherpruneError: where the model has no such parameter, or its shape is
            another.
    """
    named, pairs = plain_parameters(checked_model(model)), {}
    names = fitted_names(masks, named) or {}
    for name, mask in masks.items():
        parameter = named.get(names.get(name, name))
        if parameter is None:
            raise FisherpruneError(
                f"masks do not fit: {type(model).__name__} has no parameter {name!r}"
            )
        if parameter.shape != mask.shape:
            raise FisherpruneError(
                f"masks do not fit: {name!r} of {type(model).__name__} has shape "
                f"{list(parameter.shape)}, its mask {list(mask.shape)}"
            )
        mask = local(split_like(mask, parameter, f"mask of {name!r}"))
        pruned = torch.empty_like(local(parameter), dtype=torch.bool)
        pairs[name] = parameter, pruned.copy_(~mask)  # strides as the weight's
    return pairs


def warn_of_collapse(masks: Mapping[str, Tensor], stacklevel: int) -> None:
    """Name the layers that keep no weight; a bias is no layer."""
    gone = [
        name
        for name, mask in masks.items()
        if not name.endswith("bias") and mask.numel() and not count(mask)
    ]
    if gone:
        some = ", ".join(map(repr, gone[:8])) + (", ..." if len(gone) > 8 else "")
        warnings.warn(
            f"masks keep no weight of {len(gone)} of {len(masks)} parameters, so "
            f"nothing passes through these layers: {some}; a smaller sparsity, "
            'min_per_layer=1 or scope "erk" or "layer" keeps some',
            LayerCollapseWarning,
            stacklevel=stacklevel + 1,
        )
