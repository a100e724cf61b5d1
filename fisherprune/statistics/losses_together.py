"""The losses of all samples by one call, of loss functions that are known.

Others run by ``torch.func.vmap``, which takes longer than the loss of a small batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def losses_together(
    loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor
) -> Tensor | None:
    """Return ``loss_fn`` of the batch of each sample alone, ``[N]``.

    None where that is not cross-entropy of class numbers, without class weights.

    Args:
        loss_fn: ``F.cross_entropy`` or ``nn.CrossEntropyLoss``.
        outputs: ``[N, classes, *]``.
        labels: ``[N, *]``.
    """
    if type(loss_fn) is nn.CrossEntropyLoss:
        hooked = loss_fn._forward_hooks or loss_fn._forward_pre_hooks
        if loss_fn.weight is not None or loss_fn.reduction == "none" or hooked:
            return None
        sums = loss_fn.reduction == "sum"
        ignored, smoothing = loss_fn.ignore_index, loss_fn.label_smoothing
    elif loss_fn is F.cross_entropy:
        sums, ignored, smoothing = False, -100, 0.0
    else:
        return None
    numbers = (*outputs.shape[:1], *outputs.shape[2:])
    if outputs.dim() < 2 or labels.dtype != torch.int64 or labels.shape != numbers:
        return None
    losses = F.cross_entropy(
        outputs,
        labels,
        ignore_index=ignored,
        reduction="none",
        label_smoothing=smoothing,
    )
    if losses.dim() > 1:
        losses = losses.flatten(1).sum(1)
    if sums:
        return losses
    # Of a sample whose positions are all ignored, the mean is no number.
    return losses / (labels != ignored).reshape(len(labels), -1).sum(1)
