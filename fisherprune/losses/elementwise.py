"""Losses of single outputs: squared errors, and cross-entropies of yes and no."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.losses.reading import is_mean, outputs_and_labels, reduced, unfit
from fisherprune.statistics.known_losses import register_reader, share_of
from fisherprune.statistics.likelihoods import Bernoulli, Gaussian


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
    return _read_regression(model, batch, reduction=reduction).losses()


@register_reader(regression)
def _read_regression(
    model: nn.Module, batch: Any, *, reduction: str = "mean"
) -> Gaussian:
    op = "regression"
    outputs, labels = outputs_and_labels(op, model, batch)
    if labels.shape != outputs.shape or labels.is_complex():
        unfit(op, "labels must be real numbers of the outputs' shape", outputs, labels)

    def losses() -> Tensor:
        each = F.mse_loss(outputs, labels.to(outputs), reduction="none")
        return reduced(op, each, None, reduction)

    return Gaussian(outputs, losses, share_of(outputs, is_mean(op, reduction)))


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
    return _read_binary(model, batch, reduction=reduction).losses()


@register_reader(binary)
def _read_binary(model: nn.Module, batch: Any, *, reduction: str = "mean") -> Bernoulli:
    op = "binary"
    outputs, labels = outputs_and_labels(op, model, batch)
    if labels.shape != outputs.shape or labels.is_complex():
        unfit(op, "labels must be numbers of the outputs' shape", outputs, labels)
    labels = labels.to(outputs)
    if not ((labels >= 0) & (labels <= 1)).all():
        unfit(op, "labels must lie in [0, 1]", outputs, labels)

    def losses() -> Tensor:
        each = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return reduced(op, each, None, reduction)

    return Bernoulli(outputs, losses, share_of(outputs, is_mean(op, reduction)))
