"""Initial weights beside a network's own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fisherprune.errors import FieldError, near, shown

INITS = {
    "default": "the network's own",
    "kaiming_normal": "normal of variance 2 / fan-in in convolutions and Linear "
    "layers, their biases 0",
    "kaiming_normal_fan_out": "normal of variance 2 / fan-out in convolutions, their "
    "biases 0, the rest the network's own",
}
"""How weights can be initialized, and what that means."""


@torch.no_grad()
def initialize_(
    model: nn.Module, init: str, generator: torch.Generator | None = None
) -> None:
    """Draw the weights of convolutions and Linear layers anew (He et al. 2015).

    ``kaiming_normal`` draws each weight from a normal distribution of variance
    ``2 / fan_in``, in convolutions and Linear layers; ``kaiming_normal_fan_out`` of
    variance ``2 / fan_out``, in convolutions alone, as torchvision's ResNets do. Fan-in
    is the number of inputs of an output (input channels times the positions of the
    kernel), fan-out that of outputs of an input. Biases of these layers become 0. All
    other parameters stay, and with ``default`` all do.

    Args:
        model: any network.
        init: a key of ``INITS``.
        generator: of the random numbers; None is the global one.

    Raises:
        FisherpruneError: for an unknown ``init``.
    """
    checked_init(init)
    if init == "default":
        return
    by_fan_out = init == "kaiming_normal_fan_out"
    kinds = (_ConvNd,) if by_fan_out else (_ConvNd, nn.Linear)
    for module in model.modules():
        if isinstance(module, kinds):
            nn.init.kaiming_normal_(
                module.weight,
                mode="fan_out" if by_fan_out else "fan_in",
                nonlinearity="relu",
                generator=generator,
            )
            if module.bias is not None:
                module.bias.zero_()


def checked_init(init: str) -> None:
    """Refuse what is no key of ``INITS``.

    Raises:
        FieldError: naming what came.
    """
    if init not in INITS:
        wanted = f"one of {', '.join(INITS)}"
        raise FieldError("init", wanted, f"{shown(init)}{near(str(init), INITS)}")
