"""Sanity baselines: what an accuracy owes to the criterion, and what it does not.

Each destroys one piece of information and keeps the rest; they combine with any
criterion, sparsity and scope. Frankle et al. 2021, "Pruning Neural Networks at
Initialization: Why Are We Missing the Mark?", arXiv 2009.08576; Su et al. 2020,
"Sanity-Checking Pruning Methods", arXiv 2009.11094. The fourth of them, random masks
at given densities, is the criterion ``random`` with scope "erk" or "densities".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisherprune.masks.masks import Masks
from fisherprune.parameters import eager
from fisherprune.shards import check_whole
from fisherprune.statistics.redraw import redraw_
from fisherprune.streams import stream


def invert_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores negated: the weights scored lowest are kept.

    Of equal scores the first in order are still kept first.
    """
    return {name: -s for name, s in scores.items()}


def shuffle_masks(masks: Mapping[str, Tensor], seed: int = 0) -> Masks:
    """Return each mask permuted at random: a layer keeps other weights, but as many.

    Args:
        masks: bool masks by parameter name.
        seed: a layer's permutation depends on it, the layer's name and its shape.
    """
    instead = "shuffle_masks(masks.whole()), the same masks on each rank"
    check_whole("shuffle_masks: masks", instead, masks)
    shuffled = {}
    for name, mask in masks.items():
        generator = stream(seed, name)
        order = torch.randperm(mask.numel(), generator=generator, device="cpu")
        order = order.to(mask.device)
        shuffled[name] = mask.flatten()[order].view(mask.shape)
    return Masks(shuffled)


def reinitialize_(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, seed: int = 0
) -> None:
    """Draw a new initialization of the whole model: nothing it learned is left.

    Every module draws its parameters anew by its own ``reset_parameters``, the
    classifier's too; for BatchNorm that includes the running statistics, which were
    those of other weights. With ``optimizer`` its state (momentum) is dropped as well.
    Under ``Masks.hold`` pruned weights are drawn too: ``masks.apply_(model)`` sets them
    back to zero at once, the optimizer's next step does in any case.

    Args:
        model: any network of modules that have ``reset_parameters``, as torch's have.
        optimizer: what trains it; learning rates and other options stay.
        seed: the weights depend on it alone, not on the device; the global random
            state is left as it was.

    Raises:
        FisherpruneError: where a module has parameters of its own and can't reset them;
            the model is then left as it was.
    """
    redraw_("reinitialize_", eager(model), seed)
    if optimizer is not None:
        optimizer.state.clear()
