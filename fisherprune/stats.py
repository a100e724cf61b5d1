"""The statistics passes over the data: gradient moments, Hessian-gradient product.

A pass is slow and written once; what a criterion makes of it stands in ``criteria.py``.
All passes run the model in eval mode, where samples do not mix, and leave weights,
gradients, modes, buffers, hooks and the global random state as they found them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fisherprune.accumulators import Groups, Moments
from fisherprune.errors import FisherpruneError
from fisherprune.guards import (
    Batches,
    Parameters,
    check_finite,
    checked_batches,
    checked_parameters,
    device_of,
    eager,
    evaluating,
)
from fisherprune.losses import LossFn, sample_losses
from fisherprune.tap import LayerTap


@dataclass(frozen=True)
class GradientMoments:
    r"""First and second moments of the group gradients :math:`G_1 ... G_J`.

    Attributes:
        mean: :math:`m = \frac1J \sum_j G_j` by parameter name, float32.
        fisher: :math:`F = \frac1J \sum_j G_j \odot G_j`, by parameter name, float32;
            the empirical Fisher diagonal where the group size is 1.
        samples: number of samples seen.
        groups: J.
        group_size: samples averaged in one group.
    """

    mean: dict[str, Tensor]
    fisher: dict[str, Tensor]
    samples: int
    groups: int
    group_size: int


def gradient_moments(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    group_size: int = 1,
    parameters: Parameters | None = None,
) -> GradientMoments:
    r"""Compute mean and mean square of the per-sample gradients, exactly, in one pass.

    With :math:`L_j` the mean loss of the j-th ``group_size`` consecutive samples
    (groups run on across batches, the last may be smaller and counts like others) and
    :math:`G_j` its gradient, returns :math:`m = \frac1J \sum_j G_j` and
    :math:`F = \frac1J \sum_j G_j \odot G_j`. The result does not depend on the batch
    size, and no per-sample gradient of a weight is ever stored.

    Args:
        model: float32 module; runs in eval mode, and its samples must not mix.
        batches: iterable of ``(inputs, labels)``, samples first; tensors are moved to
            the model's device.
        loss_fn: ``(outputs, labels) -> loss``, cross-entropy by default. The loss of a
            sample is ``loss_fn`` of the batch made of it alone, so mean and sum
            reduction mean the same.
        group_size: samples whose mean gradient is squared as one; 1 is the exact
            empirical Fisher diagonal.
        parameters: by name, ``prunable_parameters(model)`` by default; of Conv1d,
            Conv2d, Linear and BatchNorm layers, weights and biases.

    Raises:
        FisherpruneError: where the data is empty or labels are out of range, a loss or
            gradient is not finite, samples mix, or a parameter is frozen, not float32
            or used outside of the supported layers.

    Reference:
        Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
        Gradient Descent", 2019, for F.
    """
    parameters = checked_parameters(model, parameters)
    model = eager(model)
    groups = Groups(checked_group_size(group_size))
    moments = {name: Moments.like(p) for name, p in parameters.items()}
    with evaluating(model):
        for inputs, labels in checked_batches(batches, device_of(parameters)):
            first = groups.samples == 0
            report = partial(_add, moments, groups.split(len(inputs)))
            tap = LayerTap(parameters, len(inputs), report)
            with tap:
                outputs = model(inputs)
                losses = sample_losses(outputs, labels, loss_fn)
            if first:
                _check_samples_apart(model, inputs, outputs, parameters)
            tap.backward(losses.sum())
    if groups.samples == 0:
        raise FisherpruneError("gradient_moments: batches must hold samples, got none")
    for moment in moments.values():
        moment.close(groups.open)
    mean = {name: m.sum.div_(groups.count) for name, m in moments.items()}
    fisher = {name: m.sum_sq.div_(groups.count) for name, m in moments.items()}
    check_finite(fisher, "the mean squared gradient")  # then the mean is finite too
    return GradientMoments(mean, fisher, groups.samples, groups.count, group_size)


def _add(moments, parts, name, contribution):
    moments[name].add(contribution, parts)


def checked_group_size(group_size: int) -> int:
    """Return ``group_size`` if it is an integer of at least 1.

    Raises:
        FisherpruneError: where it is not.
    """
    if (
        not isinstance(group_size, int)
        or isinstance(group_size, bool)
        or group_size < 1
    ):
        raise FisherpruneError(
            f"group_size must be an integer of at least 1, got {group_size!r}"
        )
    return group_size


@torch.no_grad()
def _check_samples_apart(model, inputs, outputs, parameters) -> None:
    """Run the first sample alone: its layers and its output must be the same."""
    with LayerTap(parameters, 1, report=None):  # checks the layers' inputs
        alone = model(inputs[:1])
    together = outputs[:1].float()
    tolerance = 1e-3 if outputs.dtype == torch.float32 else 5e-2
    if (alone.float() - together).norm() > tolerance * together.norm():
        raise FisherpruneError(
            "gradient_moments: samples mix: the model's output for a sample alone is "
            "another than in a batch (or it is random in eval mode)"
        )


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
        FisherpruneError: where the batches hold another number of samples this time.
    """
    parameters = checked_parameters(model, parameters)
    model = eager(model)
    weights = list(parameters.values())
    vector = [moments.mean[name] for name in parameters]
    product = [torch.zeros_like(w) for w in weights]
    seen = 0
    with evaluating(model):
        for inputs, labels in checked_batches(batches, device_of(parameters)):
            losses = sample_losses(model(inputs), labels, loss_fn)
            share = _sample_weights(seen, len(inputs), moments).to(losses)
            for total, part in zip(
                product, _vector_hessian(losses @ share, weights, vector), strict=True
            ):
                total += part
            seen += len(inputs)
    if seen != moments.samples:
        raise FisherpruneError(
            "hessian_gradient_product: batches must hold the same "
            f"{moments.samples} samples again, got {seen}; a list or DataLoader does"
        )
    return dict(zip(parameters, product, strict=True))


def _vector_hessian(loss, weights, vector):
    grads = torch.autograd.grad(
        loss, weights, create_graph=True, materialize_grads=True
    )
    along = sum((g * v).sum() for g, v in zip(grads, vector, strict=True))
    if not along.requires_grad:  # a loss that is linear in the weights
        return [torch.zeros_like(w) for w in weights]
    return torch.autograd.grad(along, weights, materialize_grads=True)


def _sample_weights(first: int, count: int, moments: GradientMoments) -> Tensor:
    """Return the weights of samples ``first ...`` in the mean over groups of means."""
    g, last = moments.group_size, moments.groups - 1
    group = torch.arange(first, first + count) // g
    sizes = torch.where(group < last, g, moments.samples - last * g)
    return 1.0 / (moments.groups * sizes.double())
