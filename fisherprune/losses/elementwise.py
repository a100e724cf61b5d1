"""Losses of single outputs: squared errors, and cross-entropies of yes and no."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.losses.reading import outputs_and_labels, reduced, unfit


def regression(model: nn.Module, batch: Any, *, reduction: str = "mean") -> Tensor:
    r"""Return the squared error of each sample, the mean over its outputs.

    .. math:: \ell_n = \frac1K \sum_{k=1}^K (o_{nk} - y_{nk})^2

    Args:
        model: its outputs are ``[N, *]``, K of each sample.
        batch: see ``fisherprune.losses``; labels are real numbers of the outputs'
            shape.
        reduction: "mean", or "sum" without the factor :math:`1 / K`.

    Returns:
        ``[N]``, at least float32.

    Raises:
        FisherpruneError: where the labels have another shape, or the reduction is
            another.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Linear(4, 2)
        >>> batch = torch.randn(8, 4), torch.randn(8, 2)
        >>> fisherprune.losses.regression(model, batch).shape
        torch.Size([8])
    """
    op = "regression"
    outputs, labels = outputs_and_labels(op, model, batch)
    if labels.shape != outputs.shape or labels.is_complex():
        unfit(op, "labels must be real numbers of the outputs' shape", outputs, labels)
    losses = F.mse_loss(outputs, labels.to(outputs), reduction="none")
    return reduced(op, losses, None, reduction)


def binary(model: nn.Module, batch: Any, *, reduction: str = "mean") -> Tensor:
    r"""Return the binary cross-entropy of each sample, the mean over its outputs.

    .. math:: \ell_n = -\frac1K \sum_{k=1}^K
        y_{nk} \log \sigma(o_{nk}) + (1 - y_{nk}) \log (1 - \sigma(o_{nk}))

    with :math:`\sigma` the logistic function: one question of yes and no, or several
    that don't exclude each other (multi-label classification).

    Args:
        model: its outputs are ``[N, *]``, K of each sample, before the logistic
            function.
        batch: see ``fisherprune.losses``; labels are in [0, 1], bool, integers or
            floating-point, of the outputs' shape.
        reduction: "mean", or "sum" without the factor :math:`1 / K`.

    Returns:
        ``[N]``, at least float32.

    Raises:
        FisherpruneError: where the labels have another shape or lie outside of [0, 1],
            or the reduction is another.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Linear(4, 5)
        >>> batch = torch.randn(8, 4), torch.rand(8, 5) < 0.5
        >>> fisherprune.losses.binary(model, batch).shape
        torch.Size([8])
    """
    op = "binary"
    outputs, labels = outputs_and_labels(op, model, batch)
    if labels.shape != outputs.shape or labels.is_complex():
        unfit(op, "labels must be numbers of the outputs' shape", outputs, labels)
    labels = labels.to(outputs)
    if not ((labels >= 0) & (labels <= 1)).all():
        unfit(op, "labels must lie in [0, 1]", outputs, labels)
    losses = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    return reduced(op, losses, None, reduction)
