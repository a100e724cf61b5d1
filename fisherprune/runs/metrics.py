"""Loss, accuracy, and macro precision, recall and F1 of a classifier."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Figures over one pass; precision, recall and F1 are unweighted class means."""

    loss: float
    accuracy: float
    precision: float
    recall: float
    f1: float


METRIC_NAMES = tuple(field.name for field in fields(Metrics))


class Meter:
    """Adds up loss and confusion matrix on the device, read once at the end."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        """Start from nothing."""
        self.num_classes = num_classes
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean loss of the batch, a scalar.
            logits: ``[B, num_classes]``.
            labels: int64 ``[B]``.
        """
        self.loss += loss.double() * len(labels)
        cells = labels * self.num_classes + logits.argmax(1)
        self.confusion.index_add_(0, cells, torch.ones_like(cells))

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """What adds up over several meters."""
        return self.loss, self.confusion

    def compute(self) -> Metrics:
        """Return the metrics of all batches so far, at least one image."""
        confusion = self.confusion.view(self.num_classes, -1).double().cpu()
        return metrics_of(confusion, self.loss.item() / confusion.sum().item())


def metrics_of(confusion: Tensor, loss: float) -> Metrics:
    """Compute the metrics from counts ``[true class, predicted class]``, float64.

    With hits TP, for each class: precision = TP / predicted, recall = TP / true and
    F1 = 2 TP / (predicted + true), each 0 where its divisor is 0.
    """
    hits = confusion.diagonal()
    true, predicted = confusion.sum(1), confusion.sum(0)
    return Metrics(
        loss=loss,
        accuracy=(hits.sum() / confusion.sum()).item(),
        precision=_ratio(hits, predicted),
        recall=_ratio(hits, true),
        f1=_ratio(2 * hits, predicted + true),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Return the mean of part / whole, 0 / 0 counting as 0."""
    return (part / whole.clamp(min=1)).mean().item()
