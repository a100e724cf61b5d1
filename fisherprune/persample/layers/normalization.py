"""Normalization within each sample, with a weight and a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.contributions import Rows, summed_positions
from fisherprune.persample.meeting import register_gradients


def _rows(grads: Tensor, shape: Sequence[int]) -> Rows:
    """Sum over positions: ``[N, *, *shape] -> [N, *shape]``."""
    positions = grads.dim() - len(shape)
    if positions > 1:
        grads = grads.flatten(1, positions - 1).sum(1, dtype=torch.float32)
    return Rows(grads)


@register_gradients(F.layer_norm)
def layer_norm(
    grad: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Rows]:
    """Weight: the gradient times the normalized input; bias: the gradient."""
    normalized = F.layer_norm(input, normalized_shape, eps=eps)
    shape = tuple(normalized_shape)
    return {"weight": _rows(grad * normalized, shape), "bias": _rows(grad, shape)}


@register_gradients(F.rms_norm)
def rms_norm(
    grad: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> dict[str, Rows]:
    """Weight: the gradient times the normalized input."""
    normalized = F.rms_norm(input, normalized_shape, eps=eps)
    return {"weight": _rows(grad * normalized, tuple(normalized_shape))}


@register_gradients(F.group_norm, positions=False)
def group_norm(
    grad: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Rows]:
    """Weight: the gradient times the normalized input; bias: the gradient."""
    normalized = F.group_norm(input, num_groups, eps=eps)
    return {
        "weight": summed_positions(grad * normalized),
        "bias": summed_positions(grad),
    }


@register_gradients(F.instance_norm, positions=False)
def instance_norm(
    grad: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Rows]:
    """Weight: the gradient times the normalized input; bias: the gradient."""
    stats = (None, None) if use_input_stats else (running_mean, running_var)
    normalized = F.instance_norm(input, *stats, None, None, use_input_stats, 0.0, eps)
    return {
        "weight": summed_positions(grad * normalized),
        "bias": summed_positions(grad),
    }
