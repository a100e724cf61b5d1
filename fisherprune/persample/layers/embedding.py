"""Embeddings, and bags of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.lookups import Lookups
from fisherprune.persample.meeting import register_gradients


def _lookups(
    indices: Tensor, grad: Tensor, weight: Tensor, padding_idx: int | None
) -> dict[str, Lookups]:
    """Return those of ``indices`` ``[N, T]``; padding has no gradient."""
    if padding_idx is not None:
        indices = indices.masked_fill(indices == padding_idx % len(weight), -1)
    return {"weight": Lookups(indices, grad, len(weight))}


@register_gradients(F.embedding)
def embedding(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Lookups] | None:
    """Return the gradients of the rows looked up."""
    if scale_grad_by_freq:
        return None
    indices = input.reshape(len(input), -1)
    grads = grad.reshape(len(input), -1, grad.shape[-1])
    return _lookups(indices, grads, weight, padding_idx)


@register_gradients(F.embedding_bag, positions=False)
def embedding_bag(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> dict[str, Lookups] | None:
    """Give each row of a bag the bag's gradient, or its share."""
    if mode == "max" or scale_grad_by_freq or offsets is not None:
        return None
    grads = grad.unsqueeze(1).expand(-1, input.shape[1], -1)
    if per_sample_weights is not None:
        grads = grads * per_sample_weights.unsqueeze(-1)
    if mode == "mean":
        counted = input != (-1 if padding_idx is None else padding_idx % len(weight))
        grads = grads / counted.sum(1).clamp_min(1)[:, None, None]
    return _lookups(input, grads, weight, padding_idx)
