"""The product of the Hessian of the mean loss with its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import (
    Parameters,
    checked_parameters,
    device_of,
    eager,
)
from fisherprune.statistics.batches import Batches, checked_batches
from fisherprune.statistics.losses import (
    LossFn,
    checked_loss,
    sample_losses,
)
from fisherprune.statistics.moments import GradientMoments
from fisherprune.statistics.protect import evaluating

GRADIENT_TOLERANCE = 5e-2
"""Of the same gradient found twice, where TF32 or bfloat16 may be at work."""


def hessian_gradient_product(
    model: nn.Module,
    batches: Batches,
    moments: GradientMoments,
    loss_fn: LossFn | None = None,
    *,
    parameters: Parameters | None = None,
) -> dict[str, Tensor]:
    r"""Compute :math:`H m`, the Hessian of the mean loss times its gradient.

    :math:`H` is the Hessian of :math:`\frac1J \sum_j L_j` with respect to
    ``parameters`` and :math:`m` its gradient, ``moments.mean``, over the same batches;
    double backpropagation, one batch at a time.

    Raises:
        FisherpruneError: where the batches hold other samples this time, by their
            number or by their gradient.
    """
    parameters, loss_fn = checked_parameters(model, parameters), checked_loss(loss_fn)
    model = eager(model)
    weights = list(parameters.values())
    vector = [moments.mean[name] for name in parameters]
    seen = 0
    # Attention's fused kernels have no second derivative.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        product, gradient = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        for inputs, labels in checked_batches(batches, device_of(parameters)):
            losses = sample_losses(model(inputs), labels, loss_fn)
            share = _sample_weights(seen, len(inputs), moments).to(losses)
            parts = _vector_hessian(losses @ share, weights, vector)
            for totals, some in zip((gradient, product), parts, strict=True):
                for total, part in zip(totals, some, strict=True):
                    total += part.detach()
            seen += len(inputs)
    if seen != moments.samples:
        raise FisherpruneError(
            "hessian_gradient_product: batches must hold the same "
            f"{moments.samples} samples again, got {seen}; a list or DataLoader does"
        )
    if not _is_gradient(gradient, vector, moments):
        raise FisherpruneError(
            "hessian_gradient_product: batches must hold the same samples again, but "
            "their gradient is another; a DataLoader with a generator of its own draws "
            "others each time: make a list of its batches"
        )
    return dict(zip(parameters, product, strict=True))


def _vector_hessian(loss, weights, vector):
    """Return the gradient and the product."""
    grads = torch.autograd.grad(
        loss, weights, create_graph=True, materialize_grads=True
    )
    along = sum((g * v).sum() for g, v in zip(grads, vector, strict=True))
    if not along.requires_grad:  # a loss that is linear in the weights
        return grads, [torch.zeros_like(w) for w in weights]
    return grads, torch.autograd.grad(along, weights, materialize_grads=True)


def _is_gradient(found, expected, moments: GradientMoments) -> bool:
    """Return whether it is ``expected``, up to what rounding does to single samples."""

    def norm(tensors) -> float:
        return math.hypot(*(torch.linalg.vector_norm(t).item() for t in tensors))

    error = norm(f - e for f, e in zip(found, expected, strict=True))
    single = math.sqrt(sum(f.sum().item() for f in moments.fisher.values()))
    return error <= GRADIENT_TOLERANCE * (norm(expected) + 0.02 * single)


def _sample_weights(first: int, count: int, moments: GradientMoments) -> Tensor:
    """Return the weights of samples ``first ...`` in the mean over groups of means."""
    g, last = moments.group_size, moments.groups - 1
    group = torch.arange(first, first + count) // g
    sizes = torch.where(group < last, g, moments.samples - last * g)
    return 1.0 / (moments.groups * sizes.double())
