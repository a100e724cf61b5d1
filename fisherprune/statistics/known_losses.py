"""Which losses say how their labels are distributed, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.shards import joined_parts
from fisherprune.statistics.batches import Batch
from fisherprune.statistics.categorical import categorical
from fisherprune.statistics.likelihoods import Bernoulli, Gaussian, Likelihood
from fisherprune.statistics.losses import (
    Losses,
    LossFn,
    SampleLosses,
    check_predictions,
    checked_outputs,
)

if TYPE_CHECKING:
    from fisherprune.statistics.passes import Task

Reader = Callable[[nn.Module, Batch], Likelihood]
"""Runs the model on a batch."""

READERS: dict[Any, Callable[..., Likelihood]] = {}
"""By the function ``losses(model, batch, **options)``: the same, of its likelihood."""

KNOWN = (
    "none (cross-entropy), nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss or "
    "their functions F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits; "
    "in their place losses=fisherprune.losses.classification, sequences, next_token, "
    "regression or binary; options by functools.partial"
)
"""The losses that say how their labels are distributed."""

OPTIONS: dict[Any, dict[str, Any]] = {
    F.cross_entropy: {
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
    },
    F.mse_loss: {"reduction": "mean"},
    F.binary_cross_entropy_with_logits: {"reduction": "mean"},
}
"""Options of loss functions that are known, with their defaults."""

MODULES = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}


def register_reader(losses: Callable[..., Tensor]) -> Callable[[Any], Any]:
    """Register the decorated function, which reads what ``losses`` does."""

    def register(read: Callable[..., Likelihood]) -> Callable[..., Likelihood]:
        READERS[losses] = read
        return read

    return register


def reader_of(op: str, task: Task, what: str) -> Reader:
    """Return what reads the likelihood of batches by the loss of a task.

    Args:
        op: named in errors of batches.
        task: with its loss.
        what: needs it; named in errors of the loss.

    Raises:
        FisherpruneError: where nothing is known of the loss.
    """
    if task.losses is not None:
        function, options = _unbound(task.losses)
        if function not in READERS:
            raise FieldError("losses", f"{KNOWN}, for {what}", shown(task.losses))
        read = partial(READERS[function], **options)
        return lambda model, batch: read(batch.watched(model), batch.content)
    make, sample_losses = _maker(op, task.loss_fn, what), SampleLosses(task.loss_fn)

    def of_pair(model: nn.Module, batch: Batch) -> Likelihood:
        inputs, labels = batch.content
        outputs = checked_outputs(joined_parts(model(inputs)), labels)
        batch.became(outputs)
        return make(outputs, labels, lambda: sample_losses(outputs, labels))

    return of_pair


def are_of_outputs(losses: Losses | None) -> bool:
    """Return whether losses are computed of a model's outputs, sample by sample."""
    return losses is None or _unbound(losses)[0] in READERS


Maker = Callable[[Tensor, Tensor, Callable[[], Tensor]], Likelihood]
"""Of outputs, labels and losses."""


def _unbound(function: Any) -> tuple[Any, dict[str, Any]]:
    """Return a function and the options that ``functools.partial`` gave it.

    It is None where it can be none of those that are known by name.
    """
    options: dict[str, Any] = {}
    while isinstance(function, partial) and not function.args:
        function, options = function.func, {**function.keywords, **options}
    return function if isinstance(function, Hashable) else None, options


def _maker(op: str, loss_fn: LossFn | None, what: str) -> Maker:
    """Return what makes the likelihood of a loss function."""
    if loss_fn is None:
        return partial(_default, op)
    function, given = _unbound(loss_fn)
    if type(function) in MODULES:
        module, function = function, MODULES[type(function)]
        names = {*OPTIONS[function], "weight", "pos_weight"}
        given = {n: getattr(module, n) for n in names if hasattr(module, n)}
    options = {n: v for n, v in given.items() if v is not None}
    known = OPTIONS.get(function)
    if known is None or not options.keys() <= known.keys():
        raise FieldError("loss_fn", f"{KNOWN}, for {what}", shown(loss_fn))
    options = known | options
    mean = options.pop("reduction") == "mean"
    if function is F.cross_entropy:
        if mean and options["weight"] is not None:
            wanted = "without class weights or of reduction='sum'"
            raise FieldError("loss_fn", f"{wanted}, for {what}", shown(loss_fn))
        return partial(_cross_entropy, mean, options)
    return partial(
        _elementwise, Gaussian if function is F.mse_loss else Bernoulli, mean
    )


def _default(
    op: str, outputs: Tensor, labels: Tensor, losses: Callable[[], Tensor]
) -> Likelihood:
    """Read cross-entropy as it is by default; of class scores, no label is read."""
    shape = list(outputs.shape)
    if len(shape) < 2 or shape[1] < 2:
        raise FisherpruneError(
            f"{op}: the model's output must be scores of at least two classes, "
            f"[N, classes, ...], got {shape}"
        )
    if len(shape) > 2:
        check_predictions(outputs, labels)
    return categorical(outputs, labels if len(shape) > 2 else None, losses)


def _cross_entropy(
    mean: bool,
    options: dict[str, Any],
    outputs: Tensor,
    labels: Tensor,
    losses: Callable[[], Tensor],
) -> Likelihood:
    shape = [*outputs.shape[:1], *outputs.shape[2:]]
    fits = [*labels.shape] == (
        [*outputs.shape] if labels.is_floating_point() else shape
    )
    if outputs.dim() < 2 or outputs.shape[1] < 2 or not fits:
        wanted = "scores [N, classes, *] of at least two classes for labels of N, *"
        got = f"{[*outputs.shape]} and labels {[*labels.shape]}"
        raise FieldError("the model's output", wanted, got)
    weight = options["weight"]
    if weight is not None:
        weight = weight.to(outputs.device)
    return categorical(
        outputs, labels, losses, mean=mean, **{**options, "weight": weight}
    )


def _elementwise(
    kind: type[Gaussian] | type[Bernoulli],
    mean: bool,
    outputs: Tensor,
    labels: Tensor,
    losses: Callable[[], Tensor],
) -> Likelihood:
    if outputs.shape != labels.shape:
        wanted = f"of the outputs' shape {[*outputs.shape]}"
        raise FieldError("labels", wanted, [*labels.shape])
    return kind(outputs, losses, share_of(outputs, mean))


def share_of(outputs: Tensor, mean: bool) -> float:
    """Return what a loss multiplies that of one output by."""
    return len(outputs) / outputs.numel() if mean else 1.0
