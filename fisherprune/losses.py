"""Losses of single samples, whatever the reduction of the loss function."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.errors import FisherpruneError

LossFn = Callable[[Tensor, Tensor], Tensor]


def sample_losses(outputs: Tensor, labels: Tensor, loss_fn: LossFn | None) -> Tensor:
    """Return the losses of the batches made of one sample each, float ``[N]``."""
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != labels.shape[:1]:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs)
        raise FisherpruneError(
            f"the model's output must have the batch's {len(labels)} samples as its "
            f"first dimension, got {got}"
        )
    if loss_fn is None:
        losses = _cross_entropies(outputs, labels)
    else:
        losses = _each_sample(loss_fn, outputs, labels)
    finite = losses.detach().isfinite()
    if not finite.all():
        bad = int((~finite).nonzero()[0, 0])
        raise FisherpruneError(
            f"the loss must be finite, got {losses[bad].item()} for sample {bad} of a "
            "batch"
        )
    if not losses.requires_grad:
        raise FisherpruneError("the loss does not depend on any parameter of the model")
    return losses


def _cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    classes = outputs.shape[1] if outputs.dim() > 1 else 0
    if not labels.is_floating_point():
        low, high = torch.aminmax(labels)
        if (low < 0) | (high >= classes):  # one read from the device
            raise FisherpruneError(
                f"labels must lie in [0, {classes}), the model's classes, got "
                f"{int(low)} to {int(high)}"
            )
        labels = labels.long()
    losses = F.cross_entropy(outputs.float(), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _each_sample(loss_fn: LossFn, outputs: Tensor, labels: Tensor) -> Tensor:
    def one(output, label):
        return loss_fn(output.unsqueeze(0), label.unsqueeze(0)).sum()

    try:
        return torch.func.vmap(one, randomness="different")(outputs, labels)
    except RuntimeError:  # a loss that vmap can't run, .item() or data-dependent
        pairs = zip(outputs, labels, strict=True)
        return torch.stack([one(output, label) for output, label in pairs])
