"""Labelled batches, checked one by one and moved to the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.progress import shown_bar
from fisherprune.statistics.interrupts import deliver_interrupt

Batches = Iterable[tuple[Tensor, Tensor]]


def checked_batches(
    batches: Batches, device: torch.device, title: str = ""
) -> Iterator[Batch]:
    """Yield the batches on ``device``, each checked to be a labelled batch.

    Between batches a Ctrl-C takes effect. With a ``title`` a progress bar is shown.
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise FisherpruneError(
            "batches must be an iterable of (inputs, labels) tensors, got "
            f"{type(batches).__name__}"
        )
    for i, batch in enumerate(shown_bar(batches, title) if title else batches):
        deliver_interrupt()
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(t, Tensor) and t.dim() for t in batch):
            raise FisherpruneError(
                "batches must yield (inputs, labels) tensors, samples first; batch "
                f"{i} is {_described(batch)}"
            )
        inputs, labels = batch
        if len(inputs) != len(labels) or len(inputs) == 0:
            raise FisherpruneError(
                f"batch {i} must have at least one sample and one label for each, got "
                f"{len(inputs)} inputs and {len(labels)} labels"
            )
        yield Batch((_own(inputs, device), _usable(labels, device)), len(inputs))


def _described(value: object) -> str:
    """Say what came: ``tuple of (Tensor [8, 3], int)``."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {list(value.shape)}"
    if not isinstance(value, (tuple, list)):
        return kind
    items = [_described(item) for item in value[:4]] + ["..."] * (len(value) > 4)
    return f"{kind} of ({', '.join(items)})"


def _own(inputs: Tensor, device: torch.device) -> Tensor:
    """Return the inputs on ``device``, a copy: the model may change them in place."""
    moved = _usable(inputs, device)
    return moved.clone() if moved is inputs else moved


def _usable(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on ``device``, as one that autograd may save."""
    tensor = tensor.to(device, non_blocking=True)
    return tensor.clone() if tensor.is_inference() else tensor


@dataclass(frozen=True)
class Batch:
    """A batch of samples on the model's device.

    Attributes:
        content: tensors, samples first, in any structure.
        size: N.
    """

    content: Any
    size: int

    @property
    def tensors(self) -> list[Tensor]:
        """Return its tensors."""
        return list(self.content)

    @property
    def shapes(self) -> tuple[object, ...]:
        """Return shapes and dtypes but for the number of samples."""
        return tuple(
            (tuple(t.shape[len(t) == self.size :]), t.dtype) for t in self.tensors
        )

    def samples(self, index: slice | list[int], *, copied: bool = False) -> Batch:
        """Return the batch of some samples."""
        some = tuple(t[index] for t in self.content)
        some = tuple(t.clone() for t in some) if copied else some
        return Batch(some, len(some[0]))

    def one(self, i: int) -> Batch:
        """Return a sample twice, of which one counts: for autograd without the tap.

        On the CPU, PyTorch's BatchNorm in eval mode has a wrong backward pass for a
        batch of one whose gradient is expanded over positions.
        """
        return self.samples([i, i])
