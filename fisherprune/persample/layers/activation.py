"""Activations with a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherprune.persample.contributions import Rows, summed_positions
from fisherprune.persample.meeting import register_gradients


@register_gradients(torch.prelu, positions=False)
def prelu(grad: Tensor, input: Tensor, weight: Tensor) -> dict[str, Rows]:
    """Weight: the gradient times what of the input is below zero."""
    rows = (grad * input.clamp(max=0)).float()
    if weight.numel() == 1:
        return {"weight": Rows(rows.flatten(1).sum(1).view(-1, *weight.shape))}
    return {"weight": summed_positions(rows)}
