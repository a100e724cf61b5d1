"""Losses of single samples, whatever the reduction of the loss function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError, FisherpruneWarning, shown
from fisherprune.statistics.losses_together import losses_together
from fisherprune.statistics.structure import described
from fisherprune.statistics.verdicts import Condition, Expect, at_once

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``(outputs, labels) -> loss``."""

Losses = Callable[[nn.Module, Any], Tensor]
"""``(model, batch) -> losses``, one for each of the batch's samples."""


def checked_loss(loss_fn: LossFn | None) -> LossFn | None:
    """Return ``loss_fn`` if it is a function that can be applied to one sample.

    Raises:
        FisherpruneError: where it can't be called or is a class, or where it divides by
            the weights of the samples' classes, which cancels them out for one sample.
    """
    if loss_fn is None:
        return None
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise FisherpruneError(
            "loss_fn must be a function (outputs, labels) -> loss, or a module such as "
            f"nn.CrossEntropyLoss(), got {shown(loss_fn)}"
        )
    if (
        isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        and loss_fn.weight is not None
        and loss_fn.reduction == "mean"
    ):
        kind = type(loss_fn).__name__
        raise FisherpruneError(
            f"loss_fn: {kind} with class weights must have reduction='sum', got 'mean',"
            " which divides the loss of one sample by its class's weight again"
        )
    return loss_fn


def checked_losses(losses: Losses) -> Losses:
    """Return ``losses`` if it is a function.

    Raises:
        FisherpruneError: where it can't be called, or is a class or a module.
    """
    if not callable(losses) or isinstance(losses, type | nn.Module):
        raise FisherpruneError(
            "losses must be a function (model, batch) -> Tensor [N], such as "
            f"fisherprune.losses.classification, got {shown(losses)}"
        )
    return losses


class SampleLosses:
    """``sample_losses`` of batch after batch; the first is compared as a whole."""

    def __init__(self, loss_fn: LossFn | None) -> None:
        self.loss_fn, self.compared = loss_fn, loss_fn is None

    def __call__(
        self, outputs: Tensor, labels: Tensor, expect: Expect = at_once
    ) -> Tensor:
        """Return the losses of the batch's samples."""
        losses = sample_losses(outputs, labels, self.loss_fn, expect)
        if self.loss_fn is not None and not self.compared and len(losses) > 1:
            self.compared = True
            exact = outputs.dtype in (torch.float32, torch.float64)
            with torch.no_grad():
                whole = self.loss_fn(outputs, labels).sum()
                _compare(whole, losses, 1e-3 if exact else 2e-2)
        return losses


def _compare(batch: Tensor, losses: Tensor, tolerance: float) -> None:
    """Warn where the batch's loss is neither mean nor sum of its samples' losses."""
    whole, mean, sum = float(batch), float(losses.mean()), float(losses.sum())
    scale = max(float(losses.abs().mean()), 1e-30)
    errors = abs(whole - mean) / scale, abs(whole - sum) / (scale * len(losses))
    if min(errors) > tolerance:
        warnings.warn(
            f"loss_fn: of the first batch it is {whole:g}, but of its samples alone "
            f"the mean is {mean:g} and the sum {sum:g}, and those are scored: each "
            "sample is divided by its own class weights or number of positions; a "
            "loss_fn with reduction='sum' keeps them",
            FisherpruneWarning,
            stacklevel=2,
        )


def sample_losses(
    outputs: Tensor, labels: Tensor, loss_fn: LossFn | None, expect: Expect = at_once
) -> Tensor:
    """Return the losses of the batches made of one sample each, float ``[N]``.

    Args:
        outputs: the model's, ``[N, ...]``; of the default loss ``[N, classes, *]``.
        labels: ``[N, ...]``; of the default loss class numbers ``[N, *]`` or
            probabilities like the outputs.
        loss_fn: ``(outputs, labels) -> loss``; cross-entropy where it is None, the mean
            over the positions ``*``.
        expect: takes the conditions on values: labels are classes, losses are finite.

    Raises:
        FisherpruneError: where outputs, labels or losses are not of such shapes, or
            depend on no parameter; of a condition where a label is no class, or a loss
            is not finite.
    """
    checked_outputs(outputs, labels)
    if loss_fn is None:
        losses = _cross_entropies(outputs, labels, expect)
    else:
        known = losses_together(loss_fn, outputs, labels)
        losses = _each_sample(loss_fn, outputs, labels) if known is None else known
    return _checked_values(losses, expect)


def checked_sample_losses(
    losses: Tensor, samples: int, expect: Expect = at_once
) -> Tensor:
    """Return what a function ``losses`` returned if it is a loss for each sample.

    Args:
        losses: floating-point ``[N]``.
        samples: N, the batch's.
        expect: takes the condition that losses are finite.

    Raises:
        FisherpruneError: where it has another type or shape or depends on no parameter;
            of the condition where a loss is not finite.
    """
    tensor = isinstance(losses, Tensor)
    if not tensor or losses.shape != (samples,) or not losses.is_floating_point():
        got = type(losses).__name__
        if tensor:
            got = f"{str(losses.dtype).removeprefix('torch.')} {list(losses.shape)}"
        raise FisherpruneError(
            f"losses must return one floating-point loss for each of the batch's "
            f"{samples} samples, a tensor [{samples}], got {got}: reduction='none', "
            "and a mean over each sample's own positions, gives such ones, as do the "
            "functions in fisherprune.losses; most tensors of the batch have "
            f"{samples} rows, which count as samples: pad others, as nodes of graphs"
        )
    return _checked_values(losses, expect)


def _checked_values(losses: Tensor, expect: Expect) -> Tensor:
    with torch._C.DisableTorchFunction():  # no detach of the model's
        values = losses.detach()
    finite = values.isfinite()

    def infinite() -> FisherpruneError:
        bad = int((~finite).nonzero()[0, 0])
        return FisherpruneError(
            f"the loss must be finite, got {values[bad].item()} for sample {bad} of a "
            "batch (a mean is NaN where all labels of a sample are ignored)"
        )

    expect(Condition(finite.all(), infinite))
    if not losses.requires_grad:
        raise FisherpruneError("the loss does not depend on any parameter of the model")
    return losses


def checked_outputs(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return ``outputs`` if they are a tensor with the labels' samples first.

    Raises:
        FisherpruneError: where they are not.
    """
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != labels.shape[:1]:
        raise FisherpruneError(
            f"the model's output must be a tensor with the batch's {len(labels)} "
            f"samples as its first dimension, got {described(outputs)}: for others "
            "give losses, a function (model, batch) -> Tensor [N]"
        )
    return outputs


def _cross_entropies(outputs: Tensor, labels: Tensor, expect: Expect) -> Tensor:
    check_predictions(outputs, labels, expect)
    if not labels.is_floating_point():
        labels = _classes(labels, outputs.shape[1], expect)
    losses = F.cross_entropy(outputs.float(), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _classes(labels: Tensor, classes: int, expect: Expect) -> Tensor:
    """Return the labels, those that are no class as one: none ends up outside."""
    low, high = torch.aminmax(labels)

    def outside() -> FisherpruneError:
        return FisherpruneError(
            f"labels must lie in [0, {classes}), the model's classes, got {int(low)} "
            f"to {int(high)}: for labels to be ignored give "
            "loss_fn=nn.CrossEntropyLoss(ignore_index=...)"
        )

    expect(Condition((low >= 0) & (high < classes), outside))
    return labels.long().clamp(0, classes - 1)


def check_predictions(
    outputs: Tensor, labels: Tensor, expect: Expect = at_once
) -> None:
    """Check the shapes, of which cross-entropy reads several as one big sample."""
    shape = list(outputs.shape)
    if len(shape) < 2:
        raise FisherpruneError(
            f"the model's output must be [N, classes, ...] for cross-entropy, the "
            f"default, got {shape}: give a loss_fn"
        )
    if shape[1] == 1:
        raise FisherpruneError(
            "the model's output must have at least two classes for cross-entropy, the "
            f"default, which of one class is always 0, got {shape}: give a loss_fn"
        )
    numbers, came = shape[:1] + shape[2:], list(labels.shape)
    if came != (shape if labels.is_floating_point() else numbers):
        dtype = str(labels.dtype).removeprefix("torch.")
        raise FisherpruneError(
            f"labels must be class numbers, integers {numbers}, or probabilities, "
            f"floating-point {shape}, for cross-entropy, the default, got {dtype} "
            f"{came}: change them or give a loss_fn"
        )
    if len(shape) == 3 and shape[1] == shape[2] and came == numbers:
        raise FisherpruneError(
            f"the model's output {shape} may be [N, classes, positions] or "
            "[N, positions, classes]: give a loss_fn, F.cross_entropy for the first"
        )
    if labels.is_floating_point():
        _check_probabilities(labels, expect)


def _check_probabilities(labels: Tensor, expect: Expect) -> None:
    sums = labels.sum(1)

    def improbable() -> FisherpruneError:
        return FisherpruneError(
            "floating-point labels must be probabilities for cross-entropy, the "
            "default: at least 0, with sum 1 over the classes, got sums from "
            f"{sums.min():g} to {sums.max():g}, {labels.min():g} as the least: give a "
            "loss_fn"
        )

    holds = (labels >= 0).all() & ((sums - 1).abs() <= 1e-2).all()
    expect(Condition(holds, improbable))


def _each_sample(loss_fn: LossFn, outputs: Tensor, labels: Tensor) -> Tensor:
    def one(output: Tensor, label: Tensor) -> Tensor:
        loss = loss_fn(output.unsqueeze(0), label.unsqueeze(0))
        if not isinstance(loss, Tensor):
            raise FisherpruneError(
                f"loss_fn must return a tensor, got {type(loss).__name__}"
            )
        return loss.sum()

    try:
        return torch.func.vmap(one, randomness="different")(outputs, labels)
    except RuntimeError:  # a loss that vmap can't run, .item() or data-dependent
        pairs = zip(outputs, labels, strict=True)
        return torch.stack([one(output, label) for output, label in pairs])
