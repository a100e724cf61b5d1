"""Batches, checked one by one and moved to the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError, FisherpruneWarning
from fisherprune.persample.tap import RECOMPUTING, OwnGradientsError, recomputes
from fisherprune.progress import shown_bar
from fisherprune.statistics.interrupts import deliver_interrupt
from fisherprune.statistics.structure import (
    count_samples,
    described,
    map_tensors,
    moved,
    named_tensors,
    repeated,
    some_samples,
    tensors_in,
)

Batches = Iterable[Any]
"""Of ``(inputs, labels)`` tensors; with a ``losses`` function, of any structure."""


def checked_batches(
    batches: Batches, device: torch.device, title: str = "", *, labelled: bool = True
) -> Iterator[Batch]:
    """Yield copies of the batches on ``device``, each checked to hold samples.

    Between batches a Ctrl-C takes effect. With a ``title`` a progress bar is shown.
    Those that are ``labelled`` must be pairs of inputs and labels, others may have any
    structure.
    """
    check_iterable(batches, labelled)
    for i, batch in enumerate(shown_bar(batches, title) if title else batches):
        deliver_interrupt()
        check_batch(i, batch, labelled)
        size = len(batch[0]) if labelled else count_samples(batch)
        yield Batch(moved(batch, device), size, i)


def check_iterable(batches: Batches, labelled: bool) -> None:
    """Refuse batches that can't be read one after the other."""
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        of = "(inputs, labels) tensors" if labelled else "batches"
        raise FisherpruneError(
            f"batches must be an iterable of {of}, got {type(batches).__name__}"
        )


@contextmanager
def running(op: str, batch: Batch) -> Iterator[None]:
    """Name the batch in errors of the forward pass inside.

    Args:
        op: named in errors.
        batch: what the model is run on; a lone tensor and a pair's first are inputs.

    Raises:
        FisherpruneError: where something fails that is no error of this package, does
            not say that memory ran out, and is no interrupt; or an earlier run has
            changed the batch.
    """
    batch.check_unchanged(op)

    def what() -> str:
        return f"the model failed on batch {batch.index} ({_tensors(batch.content)})"

    with failing(op, what):
        yield


@contextmanager
def failing(op: str, what: Callable[[], str]) -> Iterator[None]:
    """Say what failed inside.

    Raises:
        FisherpruneError: as ``running`` does.
    """
    try:
        yield
    except (FisherpruneError, FisherpruneWarning, OwnGradientsError, MemoryError):
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise FisherpruneError(f"{op}: {what()}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the first line of what the error says, and its kind where it matters."""
    kind, line = type(error).__name__, f"{error}".partition("\n")[0]
    if not line:
        return kind
    return line if isinstance(error, RuntimeError) else f"{kind}: {line}"


@contextmanager
def backward(op: str) -> Iterator[None]:
    """Say that the backward pass inside failed.

    Raises:
        FisherpruneError: as ``running`` does.
    """
    with failing(op, lambda: "the backward pass failed"):
        try:
            yield
        except RuntimeError as error:
            if recomputes(error):
                raise FisherpruneError(f"{op}: {RECOMPUTING}") from None
            raise


def grads_of(
    op: str, loss: Tensor | Sequence[Tensor], weights: Sequence[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    """Return what ``torch.autograd.grad`` does, zeros where nothing depends on one.

    Raises:
        FisherpruneError: as ``backward`` does.
    """
    with backward(op):
        return torch.autograd.grad(loss, weights, materialize_grads=True, **options)


@dataclass(frozen=True)
class Batch:
    """A batch of samples on the model's device.

    Attributes:
        content: tensors in any structure; those of N entries hold the samples.
        size: N.
        index: its number.
        watch: is told what a model made of it.
        versions: of the tensors as they came, which count changes in place.
    """

    content: Any
    size: int
    index: int = 0
    watch: Callable[[object], None] | None = None
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Note the versions."""
        object.__setattr__(self, "versions", self._versions_now())

    def _versions_now(self) -> list[int]:
        with torch._C.DisableTorchFunction():  # these questions are no calls
            every = tensors_in(self.content)
            return [0 if t.is_inference() else t._version for t in every]

    def check_unchanged(self, op: str) -> None:
        """Refuse to run a batch again that a run of the model has changed.

        Raises:
            FisherpruneError: where it has.
        """
        if self._versions_now() != self.versions:
            raise FisherpruneError(
                f"{op}: the model must not change its inputs in place, which it reads "
                f"again, got other values in batch {self.index} after its run: let it "
                "change a copy"
            )

    def became(self, outputs: object) -> None:
        """Tell who watches what a model made of it, before a loss is computed."""
        if self.watch:
            self.watch(outputs)

    def watched(self, model: nn.Module) -> Any:
        """Return the model for losses that are computed from its outputs alone.

        Where it is watched what becomes of the batch, who calls it tells that.
        """
        return partial(self._told, model) if self.watch else model

    def _told(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        self.became(outputs)
        return outputs

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors of the samples."""
        return [t for t in tensors_in(self.content) if t.dim() and len(t) == self.size]

    @property
    def shapes(self) -> tuple[object, ...]:
        """Return shapes and dtypes, but for the number of samples."""
        every = tensors_in(self.content)
        own = {id(t) for t in self.tensors}
        return tuple((tuple(t.shape[id(t) in own :]), t.dtype) for t in every)

    def one(self, i: int) -> Batch:
        """Return a copy of a sample."""
        one = some_samples(self.content, slice(i, i + 1 or None))
        return replace(self, content=map_tensors(torch.clone, one), size=1)

    def last(self, count: int) -> Batch:
        """Return a copy of the last samples, as many as there are up to a number."""
        count = min(count, self.size)
        some = some_samples(self.content, slice(self.size - count, None))
        return replace(self, content=map_tensors(torch.clone, some), size=count)

    def alone(self, i: int, times: int = 2) -> Batch:
        """Return a sample twice, of which one counts: for autograd without the tap.

        On the CPU, PyTorch's BatchNorm in eval mode has a wrong backward pass for a
        batch of one whose gradient is expanded over positions.
        """
        one = some_samples(self.content, slice(i, i + 1))
        return replace(self, content=repeated(one, times), size=times)


def check_batch(index: int, batch: Any, labelled: bool) -> None:
    """Refuse a batch without samples, and a labelled one that is no pair."""
    try:
        _check_tensors(batch)
        if not labelled:
            count_samples(batch)
    except FisherpruneError as error:
        raise FisherpruneError(f"batch {index}: {error}") from None
    if labelled:
        _check_pair(index, batch)


def _check_pair(index: int, batch: Any) -> None:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not all(isinstance(t, Tensor) and t.dim() for t in batch):
        raise FisherpruneError(
            "batches must yield (inputs, labels) tensors, samples first; batch "
            f"{index} is {described(batch)}: for another structure give losses, a "
            "function (model, batch) -> Tensor [N] as those of fisherprune.losses"
        )
    inputs, labels = batch
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise FisherpruneError(
            f"batch {index} must have at least one sample and one label for each, got "
            f"{len(inputs)} inputs and {len(labels)} labels"
        )


def _check_tensors(batch: object) -> None:
    """Refuse tensors of which samples can't be taken or computed with."""
    for place, tensor in _named(batch):
        layout = str(tensor.layout).removeprefix("torch.")
        facts = {layout: tensor.layout != torch.strided, "nested": tensor.is_nested}
        facts |= {"quantized": tensor.is_quantized, "meta": tensor.is_meta}
        for kind in [kind for kind, is_so in facts.items() if is_so]:
            raise FisherpruneError(
                "tensors must be dense and hold data, not sparse, nested, quantized or "
                f"meta, got {place} of kind {kind}"
            )


def _is_out_of_memory(error: Exception) -> bool:
    text = f"{error}"
    is_allocator = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and is_allocator
    )


def _named(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors; a lone one and a pair's are called inputs and labels."""
    if isinstance(batch, Tensor):
        return iter([("inputs", batch)])
    if type(batch) in (tuple, list) and len(batch) == 2:
        batch = {"inputs": batch[0], "labels": batch[1]}
    return named_tensors(batch)


def _tensors(batch: object) -> str:
    """Return the tensors' dtypes and shapes: ``inputs float32 [8, 3]``."""
    texts = [
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in _named(batch)
    ]
    return ", ".join(texts[:4] + ["..."] * (len(texts) > 4))
