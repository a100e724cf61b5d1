"""Masks of whole channels, and checks of models that were shrunk by them."""

from __future__ import annotations

import copy
import warnings

import torch
from sparse_nets import masked
from torch import nn

import fisherprune as fp

KINDS = nn.modules.conv._ConvNd | nn.Linear


def channels_mask(layer: nn.Module, kept: torch.Tensor) -> torch.Tensor:
    """Return the mask of a layer's weight that keeps these output channels."""
    shape = layer.weight.shape
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        groups = layer.groups
        per_input = kept.view(groups, 1, -1).expand(-1, shape[0] // groups, -1)
        kept = per_input.reshape(shape[0], -1)
    else:
        kept = kept[:, None].expand(shape[:2])
    return kept.reshape(*kept.shape, *[1] * (len(shape) - 2)).expand(shape).clone()


def outputs_of(layer: nn.Module) -> int:
    """Return how many channels a layer makes."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def masks_keeping(model: nn.Module, **kept: list[int]) -> fp.Masks:
    """Return masks by layers that keep these channels; ``__`` stands for a dot."""
    masks = {}
    for path, channels in kept.items():
        name = path.strip("_").replace("__", ".")
        layer = model.get_submodule(name)
        chosen = torch.zeros(outputs_of(layer), dtype=torch.bool)
        chosen[channels] = True
        masks[f"{name}.weight"] = channels_mask(layer, chosen)
    return fp.Masks(masks)


def random_channels(model: nn.Module, density: float = 0.5) -> fp.Masks:
    """Draw masks of whole channels, of all layers but the last Linear."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, KINDS)]
    linear = [n for n, m in layers if isinstance(m, nn.Linear)]
    return fp.Masks(
        {
            f"{name}.weight": channels_mask(
                layer, torch.rand(outputs_of(layer)) < density
            )
            for name, layer in layers
            if name not in linear[-1:]
        }
    )


def size(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def widths(model: nn.Module) -> dict[str, int]:
    """Return how many channels each layer makes."""
    return {n: outputs_of(m) for n, m in model.named_modules() if isinstance(m, KINDS)}


def shrunk(model: nn.Module, masks, x, fresh=None, quiet=True):
    """Return the shrunk model, compared with the masked one in float64.

    Args:
        model: is left in float64 and eval mode.
        masks: of it.
        x: example.
        fresh: other inputs of any number of samples; drawn if not given.
        quiet: let warnings pass.
    """
    model = copy.deepcopy(model).double().eval()
    true = masked(model, masks)
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", fp.FisherpruneWarning)
        small = fp.sparse.shrink(model, masks, x)
    fresh = torch.randn(3, *x.shape[1:]) * 3 if fresh is None else fresh
    given = fresh.double() if fresh.is_floating_point() else fresh
    with torch.no_grad():
        torch.testing.assert_close(small(given), true(given), rtol=1e-10, atol=1e-10)
    return small
