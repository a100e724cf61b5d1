"""What all losses read: a batch's labels, the model's outputs, the reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.shards import joined_parts
from fisherprune.statistics.structure import described


def outputs_and_labels(op: str, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model; return its scores, as of ``scores_of``, and the labels.

    Raises:
        FisherpruneError: where the batch is no pair and no dictionary with labels.
    """
    if isinstance(batch, Mapping) and _is_labels(batch.get("labels")):
        labels = batch["labels"]
        outputs = model(**{key: v for key, v in batch.items() if key != "labels"})
    elif isinstance(batch, (tuple, list)) and len(batch) == 2 and _is_labels(batch[1]):
        labels = batch[1]
        outputs = model(batch[0])
    else:
        raise FisherpruneError(
            f"{op}: a batch must be a pair (inputs, labels), or a dictionary with "
            f'"labels", a tensor with the samples first, got {described(batch)}'
        )
    return scores_of(op, outputs, len(labels)), labels


def _is_labels(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def scores_of(op: str, outputs: Any, samples: int) -> Tensor:
    """Return the model's scores, at least float32.

    Raises:
        FisherpruneError: where they are no tensor ``[N, ...]``.
    """
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor) or found.shape[:1] != (samples,):
        got = described(outputs if found is None else found)
        raise FisherpruneError(
            f"{op}: the model must return a tensor, or an object with one as logits, "
            f"with the batch's {samples} samples as its first dimension, got {got}"
        )
    return joined_parts(found.to(torch.promote_types(found.dtype, torch.float32)))


def unfit(op: str, wanted: str, outputs: Tensor, labels: Tensor) -> NoReturn:
    """Raise an error that says what the shapes must be, and what they are."""
    dtype = f"{labels.dtype}".removeprefix("torch.")
    raise FisherpruneError(
        f"{op}: {wanted}, got outputs {list(outputs.shape)} and labels {dtype} "
        f"{list(labels.shape)}"
    )


def reduced(op: str, losses: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    """Return the losses of samples, ``[N]``, from those of their positions.

    Args:
        op: named in errors.
        losses: ``[N, *]``, 0 where they don't count.
        counted: bool ``[N, *]``; all count where it is None.
        reduction: "mean" over a sample's own counted positions, of none 0; or "sum".
    """
    mean = is_mean(op, reduction)
    if losses.dim() == 1:
        return losses
    sums = losses.flatten(1).sum(1)
    if not mean:
        return sums
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    return sums / counted.flatten(1).sum(1).clamp_min(1)


def is_mean(op: str, reduction: str) -> bool:
    """Return whether a reduction is the mean.

    Raises:
        FisherpruneError: where it is neither that nor the sum.
    """
    if reduction not in ("mean", "sum"):
        raise FieldError(f"{op}: reduction", "'mean' or 'sum'", shown(reduction))
    return reduction == "mean"
