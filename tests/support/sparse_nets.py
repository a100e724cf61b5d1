"""Networks, masks and dense truths for tests of sparse execution."""

from __future__ import annotations

import copy

import torch
from nets import SequenceNet, TwiceNet, conv_net
from torch import nn

import fisherprune as fp

NETS = {
    "conv": (conv_net, (3, 9, 9)),
    "sequence": (SequenceNet, (4, 12)),
    "twice": (TwiceNet, (4, 8, 8)),
    "resnet": (lambda: fp.models.resnet20(num_classes=5), (3, 16, 16)),
}
"""By name: what makes one, and the shape of a sample."""


def random_masks(model: nn.Module, *densities: float) -> fp.Masks:
    """Draw masks of convolutions and Linear layers, with these densities by turns."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Linear
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    masks = {}
    for i, (name, module) in enumerate(layers):
        density = densities[i % len(densities)]
        total = module.weight.numel()
        kept = torch.randperm(total) < max(1, int(density * total))
        masks[f"{name}.weight"] = kept.view(module.weight.shape)
    return fp.Masks(masks)


def masked(model: nn.Module, masks: fp.Masks) -> nn.Module:
    """Return a masked copy of a model."""
    model = copy.deepcopy(model)
    masks.apply_(model)
    return model


def doubled(model: nn.Module) -> nn.Module:
    """Return a float64 copy of a model."""
    return copy.deepcopy(model).double()


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return a cross-entropy."""
    return nn.functional.cross_entropy(model(x), y)


def case(name: str, samples: int = 6, density: float = 0.1, others: float = 0.0):
    """Return a network, its masks, and a batch; every other layer may be denser."""
    make, shape = NETS[name]
    model = make()
    batch = torch.randn(samples, *shape), torch.randint(5, (samples,))
    return model, random_masks(model, density, others or density), *batch
