"""The product of the Hessian of the mean loss with its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import Parameters, device_of
from fisherprune.statistics.accumulators import BlockSum
from fisherprune.statistics.batches import Batches, checked_batches, running
from fisherprune.statistics.forward import of_losses
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.moments import GradientMoments
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.protect import evaluating

GRADIENT_TOLERANCE = 5e-2
"""Of the same gradient found twice, where TF32 or bfloat16 may be at work."""


def hessian_gradient_product(
    model: nn.Module,
    batches: Batches,
    moments: GradientMoments,
    loss_fn: LossFn | None = None,
    *,
    losses: Losses | None = None,
    parameters: Parameters | None = None,
) -> dict[str, Tensor]:
    r"""Compute :math:`H m`, the Hessian of the mean loss times its gradient.

    :math:`H` is the Hessian of :math:`\frac1J \sum_j L_j` with respect to
    ``parameters`` and :math:`m` its gradient, ``moments.mean``, over the same batches;
    double backpropagation, one batch at a time. The moments are those of one pass, not
    a sum over shards of which one ends within a group.

    Raises:
        FisherpruneError: where the batches hold other samples this time, by their
            number or by their gradient.
    """
    task = checked_task(
        model, batches, parameters, loss_fn, moments.group_size, losses=losses
    )
    task = replace(task, found=moments.statistics)
    return dict(hessian_gradient_pass(task).parts["Hm"])


@register_pass("hessian", needs=("moments",), yields=("Hm",))
def hessian_gradient_pass(task: Task) -> ModelStatistics:
    """Yield the product with the mean gradient that was found."""
    names, weights = list(task.parameters), list(task.parameters.values())
    vector = [task.found.parts["m"][name] for name in names]
    seen = 0
    # Attention's fused kernels have no second derivative.
    with evaluating(task.model, task.parameters.values()), sdpa_kernel(SDPBackend.MATH):
        product, gradient = (
            [torch.zeros_like(w, dtype=torch.float32) for w in weights]
            for _ in range(2)
        )
        sums = BlockSum([*product, *gradient])
        device = device_of(task.parameters)
        title = "hessian_gradient_product" if task.progress else ""
        labelled, forward = task.losses is None, of_losses(task)
        for batch in checked_batches(task.batches, device, title, labelled=labelled):
            n = batch.size
            with running("hessian_gradient_product", batch):
                ran = forward(task.model, batch if n > 1 else batch.alone(0))
            losses = ran.result[:n]
            share = _sample_weights(seen, n, task.found).to(losses)
            parts = _vector_hessian(losses @ share, weights, vector)
            sums.make_room(1)
            for totals, some in zip((gradient, product), parts, strict=True):
                for total, part in zip(totals, some, strict=True):
                    total += part.detach()
            seen += n
        sums.finish()
    if seen != task.found.samples:
        raise FisherpruneError(
            "hessian_gradient_product: batches must hold the same "
            f"{task.found.samples} samples again, got {seen}; a list or DataLoader does"
        )
    if not _is_gradient(gradient, vector, task.found.parts["F"].values()):
        raise FisherpruneError(
            "hessian_gradient_product: batches must hold the same samples again, but "
            "their gradient is another; a DataLoader with a generator of its own draws "
            "others each time: make a list of its batches"
        )
    named = dict(zip(names, product, strict=True))
    return ModelStatistics({"Hm": named}, seen, task.group_size)


def _vector_hessian(
    loss: Tensor, weights: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the gradient and the product."""
    grads = torch.autograd.grad(
        loss, weights, create_graph=True, materialize_grads=True
    )
    along = torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)])
    if not along.requires_grad:  # a loss that is linear in the weights
        return grads, [torch.zeros_like(w) for w in weights]
    return grads, torch.autograd.grad(along.sum(), weights, materialize_grads=True)


def _is_gradient(
    found: Sequence[Tensor], expected: Sequence[Tensor], fisher: Iterable[Tensor]
) -> bool:
    """Return whether it is ``expected``, up to what rounding does to single samples."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.hypot(*(torch.linalg.vector_norm(t).item() for t in tensors))

    error = norm(f - e for f, e in zip(found, expected, strict=True))
    single = math.sqrt(sum(f.sum().item() for f in fisher))
    return error <= GRADIENT_TOLERANCE * (norm(expected) + 0.02 * single)


def _sample_weights(first: int, count: int, found: ModelStatistics) -> Tensor:
    """Return the weights of samples ``first ...`` in the mean over groups of means."""
    g, last = found.group_size, found.groups - 1
    group = torch.arange(first, first + count) // g
    sizes = torch.where(group < last, g, found.samples - last * g)
    return 1.0 / (found.groups * sizes.double())
