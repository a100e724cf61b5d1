"""Cross-entropy of single samples: of classes, of sequences, of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.losses.reading import is_mean, outputs_and_labels, reduced, unfit
from fisherprune.statistics.categorical import Categorical, categorical
from fisherprune.statistics.known_losses import register_reader
from fisherprune.statistics.structure import described

IGNORED = -100
"""The label that ``F.cross_entropy`` leaves out by default."""


def classification(
    model: nn.Module,
    batch: Any,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Return the cross-entropy of each sample, the mean over its positions.

    .. math:: \ell_n = \frac1{|T_n|} \sum_{t \in T_n} \sum_c w_c \,
        \bigl((1 - \epsilon)\, y_{ntc} + \epsilon / C\bigr)\, (-\log p_{ntc})

    with p the softmax of the scores over the C classes, y the labels, one-hot or
    probabilities, and :math:`T_n` the positions that count: one where the scores are
    ``[N, C]``, the pixels of a segmentation. Class weights stay: they are not divided
    by the sum of the weights, which of one sample would cancel them.

    Args:
        model: its scores are ``[N, C, *]`` with at least two classes.
        batch: see ``fisherprune.losses``; labels are class numbers ``[N, *]``, integers
            in [0, C), or probabilities ``[N, C, *]``.
        label_smoothing: :math:`\epsilon` in [0, 1].
        weight: w, float ``[C]``; ones by default.
        ignore_index: class number of positions that don't count; a sample without any
            that counts has the loss 0.

    Returns:
        ``[N]``, at least float32.

    Raises:
        FisherpruneError: where an argument, scores or labels are not such ones.

    Example:
        >>> import functools, torch, fisherprune
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
        >>> smooth = functools.partial(
        ...     fisherprune.losses.classification, label_smoothing=0.1
        ... )
        >>> smooth(model, batch).shape
        torch.Size([8])
    """
    return _read_classes(
        model,
        batch,
        label_smoothing=label_smoothing,
        weight=weight,
        ignore_index=ignore_index,
    ).losses()


@register_reader(classification)
def _read_classes(
    model: nn.Module,
    batch: Any,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
) -> Categorical:
    op = "classification"
    if not 0 <= label_smoothing <= 1:
        wanted = "a number in [0, 1]"
        raise FieldError(f"{op}: label_smoothing", wanted, shown(label_smoothing))
    scores, labels = outputs_and_labels(op, model, batch)
    if scores.dim() < 2 or scores.shape[1] < 2:
        wanted = "outputs must be [N, classes, *] with at least two classes"
        unfit(op, wanted, scores, labels)
    if weight is not None:
        weight = _checked_weight(op, weight, scores.shape[1]).to(scores)
    labels, counted = _checked_labels(op, scores, labels, ignore_index)

    def losses() -> Tensor:
        each = F.cross_entropy(
            scores, labels, weight, reduction="none", label_smoothing=label_smoothing
        )
        return reduced(op, each, counted, "mean")

    return categorical(
        scores,
        labels,
        losses,
        ignore_index=IGNORED,
        weight=weight,
        label_smoothing=label_smoothing,
    )


def sequences(
    model: nn.Module, batch: Any, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Return the cross-entropy of each sequence, the mean over its own positions.

    .. math:: \ell_n = \frac1{|T_n|} \sum_{t \in T_n} -\log p_{nt}(y_{nt}), \qquad
        T_n = \{t : y_{nt} \ne \mathrm{ignore\_index}\}

    with p the softmax of the scores over V classes or tokens: token classification,
    masked language models, and language models whose labels are shifted already.

    Args:
        model: its scores are ``[N, T, V]``.
        batch: see ``fisherprune.losses``; labels are integers ``[N, T]``, in [0, V) or
            ``ignore_index``.
        ignore_index: label of the positions that don't count.
        reduction: "mean", or "sum" without the factor :math:`1 / |T_n|`.

    Returns:
        ``[N]``, at least float32; 0 for a sample of which no position counts.

    Raises:
        FisherpruneError: where an argument, scores or labels are not such ones.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Linear(4, 3)
        >>> labels = torch.tensor([[0, 1, -100, -100], [-100, -100, -100, -100]])
        >>> losses = fisherprune.losses.sequences(model, (torch.zeros(2, 4, 4), labels))
        >>> losses[1].item()
        0.0
    """
    options = {"ignore_index": ignore_index, "reduction": reduction}
    return _read_sequences(model, batch, **options).losses()


@register_reader(sequences)
def _read_sequences(
    model: nn.Module, batch: Any, *, ignore_index: int = -100, reduction: str = "mean"
) -> Categorical:
    op = "sequences"
    scores, labels = outputs_and_labels(op, model, batch)
    labels = _checked_tokens(op, scores, labels)
    return _of_tokens(op, scores, labels, ignore_index, reduction)


def next_token(
    model: nn.Module, batch: Any, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Return the loss of a language model for each sequence.

    .. math:: \ell_n = \frac1{|T_n|} \sum_{t \in T_n} -\log p_{nt}(y_{n,t+1})

    with p the softmax of the scores over V tokens. :math:`T_n` holds the positions
    whose next label is not ``ignore_index`` and, where the batch has an
    ``attention_mask``, that are no padding and whose next one is none: so neither the
    side nor the length of the padding plays a part.

    Args:
        model: its scores are ``[N, T, V]``, those at t of the token at t + 1.
        batch: see ``fisherprune.losses``; labels are the tokens ``[N, T]`` themselves,
            not shifted, in [0, V) or ``ignore_index``. A dictionary without labels has
            them in ``input_ids``. Its ``attention_mask`` is ``[N, T]``, 0 for padding.
        ignore_index: label of the tokens that are not predicted, of a prompt say.
        reduction: "mean", or "sum" without the factor :math:`1 / |T_n|`.

    Returns:
        ``[N]``, at least float32; 0 for a sample of which no position counts.

    Raises:
        FisherpruneError: where an argument, scores, labels or mask are not such ones.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> tokens = torch.randint(9, (5, 7))
        >>> fisherprune.losses.next_token(model, (tokens, tokens)).shape
        torch.Size([5])
    """
    options = {"ignore_index": ignore_index, "reduction": reduction}
    return _read_next_token(model, batch, **options).losses()


@register_reader(next_token)
def _read_next_token(
    model: nn.Module, batch: Any, *, ignore_index: int = -100, reduction: str = "mean"
) -> Categorical:
    op, mask = "next_token", None
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if batch.get("labels") is None and "input_ids" in batch:
            batch = {**batch, "labels": batch["input_ids"]}
    scores, tokens = outputs_and_labels(op, model, batch)
    tokens = _checked_tokens(op, scores, tokens)
    # The labels move, not the scores: those would have to be copied.
    labels = F.pad(tokens[:, 1:], (0, 1), value=ignore_index)
    if mask is not None:
        labels = labels.where(_are_real(op, mask, tokens), ignore_index)
    return _of_tokens(op, scores, labels, ignore_index, reduction)


def _checked_labels(
    op: str, scores: Tensor, labels: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return labels as ``F.cross_entropy`` reads them, and which of them count."""
    if labels.is_floating_point():
        fits = labels.shape == scores.shape and (labels >= 0).all()
        if not fits or ((labels.sum(1) - 1).abs() > 1e-2).any():
            wanted = (
                "floating-point labels must be probabilities [N, classes, *], at least "
                "0 with sum 1"
            )
            unfit(op, wanted, scores, labels)
        return labels.to(scores), None
    if labels.shape != scores.shape[:1] + scores.shape[2:]:
        wanted = "labels must be class numbers [N, *] for outputs [N, classes, *]"
        unfit(op, wanted, scores, labels)
    return _checked_classes(op, labels, scores.shape[1], ignore_index)


def _are_real(op: str, mask: Any, tokens: Tensor) -> Tensor:
    """Return which positions and their next ones are no padding."""
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        wanted = f"a tensor of the tokens' shape {list(tokens.shape)}"
        raise FieldError(f"{op}: attention_mask", wanted, described(mask))
    real = mask.bool()
    return F.pad(real[:, 1:] & real[:, :-1], (0, 1))


def _checked_tokens(op: str, scores: Tensor, labels: Tensor) -> Tensor:
    fits = scores.dim() == 3 and labels.shape == scores.shape[:2]
    if not fits or labels.is_floating_point():
        wanted = "outputs must be [N, T, V] and labels integers [N, T]"
        unfit(op, wanted, scores, labels)
    return labels.long()


def _of_tokens(
    op: str, scores: Tensor, labels: Tensor, ignore_index: int, reduction: str
) -> Categorical:
    mean = is_mean(op, reduction)
    labels, counted = _checked_classes(op, labels, scores.shape[2], ignore_index)

    def losses() -> Tensor:
        each = F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction="none"
        ).view(labels.shape)
        return reduced(op, each, counted, reduction)

    return categorical(scores, labels, losses, axis=2, mean=mean, ignore_index=IGNORED)


def _checked_classes(
    op: str, labels: Tensor, classes: int, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the class numbers, IGNORED where they don't count, and which do."""
    if ignore_index is None:
        counted, values = None, labels
    else:
        counted = labels != ignore_index
        values = labels.where(counted, 0)
    if values.numel():
        low, high = torch.aminmax(values)
        if (low < 0) | (high >= classes):  # one read from the device
            also = "" if ignore_index is None else f" or be {ignore_index}"
            raise FisherpruneError(
                f"{op}: labels must lie in [0, {classes}), the model's classes{also}, "
                f"got {int(low)} to {int(high)}"
            )
    values = values.long()
    return values if counted is None else values.where(counted, IGNORED), counted


def _checked_weight(op: str, weight: Tensor, classes: int) -> Tensor:
    fits = isinstance(weight, Tensor) and weight.shape == (classes,)
    if not fits or not weight.is_floating_point():
        wanted = f"one floating-point number for each of the {classes} classes"
        raise FieldError(f"{op}: weight", wanted, shown(weight))
    return weight
