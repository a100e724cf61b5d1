"""Losses of single samples, whatever the reduction of the loss function."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError, shown

LossFn = Callable[[Tensor, Tensor], Tensor]


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


def sample_losses(outputs: Tensor, labels: Tensor, loss_fn: LossFn | None) -> Tensor:
    """Return the losses of the batches made of one sample each, float ``[N]``.

    Args:
        outputs: the model's, ``[N, ...]``; of the default loss ``[N, classes, *]``.
        labels: ``[N, ...]``; of the default loss class numbers ``[N, *]`` or
            probabilities like the outputs.
        loss_fn: ``(outputs, labels) -> loss``; cross-entropy where it is None, the mean
            over the positions ``*``.

    Raises:
        FisherpruneError: where outputs, labels or losses are not of such shapes, a
            label is no class, or a loss is not finite or depends on no parameter.
    """
    checked_outputs(outputs, labels)
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


def plain_losses(
    model: nn.Module, inputs: Tensor, labels: Tensor, loss_fn: LossFn | None
) -> Tensor:
    """Return ``sample_losses`` of the model, for autograd without the tap.

    A lone sample is run twice and counted once: on the CPU, PyTorch's BatchNorm in eval
    mode has a wrong backward pass for a batch of one whose gradient is expanded.
    """
    n = len(inputs)
    if n == 1:
        inputs, labels = torch.cat([inputs, inputs]), torch.cat([labels, labels])
    return sample_losses(model(inputs), labels, loss_fn)[:n]


def checked_outputs(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return ``outputs`` if they are a tensor with the labels' samples first.

    Raises:
        FisherpruneError: where they are not.
    """
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != labels.shape[:1]:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs)
        raise FisherpruneError(
            f"the model's output must have the batch's {len(labels)} samples as its "
            f"first dimension, got {got}"
        )
    return outputs


def _cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    _check_predictions(outputs, labels)
    if not labels.is_floating_point():
        classes = outputs.shape[1]
        low, high = torch.aminmax(labels)
        if (low < 0) | (high >= classes):  # one read from the device
            raise FisherpruneError(
                f"labels must lie in [0, {classes}), the model's classes, got "
                f"{int(low)} to {int(high)}"
            )
        labels = labels.long()
    losses = F.cross_entropy(outputs.float(), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _check_predictions(outputs: Tensor, labels: Tensor) -> None:
    """Check the shapes, of which cross-entropy reads several as one big sample."""
    shape = list(outputs.shape)
    if len(shape) < 2:
        raise FisherpruneError(
            f"the model's output must be [N, classes, ...] for cross-entropy, the "
            f"default, got {shape}: give a loss_fn"
        )
    numbers, came = shape[:1] + shape[2:], list(labels.shape)
    if came != (shape if labels.is_floating_point() else numbers):
        dtype = str(labels.dtype).removeprefix("torch.")
        raise FisherpruneError(
            f"labels must be class numbers, integers {numbers}, or probabilities, "
            f"floating-point {shape}, for cross-entropy, the default, got {dtype} "
            f"{came}: change them or give a loss_fn"
        )


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
