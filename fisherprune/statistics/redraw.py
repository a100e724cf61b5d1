"""Weights drawn anew, by each module's own ``reset_parameters``."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fisherprune.errors import FisherpruneError


@torch.no_grad()
def redraw_(op: str, model: nn.Module, seed: int) -> None:
    """Draw all parameters of a model anew, and what else its modules reset with them.

    Args:
        op: named in errors.
        model: of modules that have ``reset_parameters``, as torch's have.
        seed: the weights depend on it alone, not on the device; the global random
            state is left as it was.

    Raises:
        FisherpruneError: where a module has parameters of its own and can't reset them;
            the model is then left as it was.
    """
    fresh = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, module in fresh.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif names := [n for n, _ in module.named_parameters(recurse=False)]:
                raise FisherpruneError(
                    f"{op} draws new weights: {name or 'the model'} "
                    f"({type(module).__name__}) must have a method reset_parameters() "
                    f"that draws {', '.join(names)}: write one, or choose another "
                    "criterion"
                )
    for own, drawn in (
        *zip(model.parameters(), fresh.parameters(), strict=True),
        *zip(model.buffers(), fresh.buffers(), strict=True),
    ):
        own.copy_(drawn)
