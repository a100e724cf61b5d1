"""Weights drawn anew, by each module's own ``reset_parameters``."""

from __future__ import annotations

import torch
from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.modules import copied


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
    fresh = copied(op, model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, module in fresh.named_modules():
            if left := _reset(module):
                raise FisherpruneError(
                    f"{op} draws new weights: {name or 'the model'} "
                    f"({type(module).__name__}) must have a method reset_parameters() "
                    f"that draws {', '.join(left)}: write one"
                )
    for own, drawn in (
        *zip(model.parameters(), fresh.parameters(), strict=True),
        *zip(model.buffers(), fresh.buffers(), strict=True),
    ):
        own.copy_(drawn)


def _reset(module: nn.Module) -> list[str]:
    """Draw a module's own parameters; return the names of those that stay.

    Attention and others of torch's have their method by a private name. One that draws
    the weight of ``weight_norm``, which is computed, draws no parameter.
    """
    own = dict(module.named_parameters(recurse=False))
    before = {name: (p._version, p.clone()) for name, p in own.items()}
    private = getattr(module, "_reset_parameters", None) if own else None
    reset = getattr(module, "reset_parameters", private)
    if reset is None:
        return [*own]
    reset()
    return [
        name
        for name, (version, values) in before.items()
        if own[name]._version == version  # .data leaves it as it was
        and torch.equal(own[name], values)
        and (values != values.flatten()[:1]).any()  # zeros stay zeros
    ]
