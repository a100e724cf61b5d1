"""The statistics passes over the data: gradient moments, Hessian-gradient product.

A pass is slow and written once; what a criterion makes of it stands in ``criteria.py``.
All passes run the model in eval mode, where samples do not mix, and leave weights,
gradients, modes, buffers, hooks and the global random state as they found them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherprune.accumulators import BatchedMoments
from fisherprune.errors import FisherpruneError
from fisherprune.guards import (
    Batches,
    Parameters,
    check_finite,
    check_unhooked,
    checked_batches,
    checked_parameters,
    device_of,
    eager,
    evaluating,
)
from fisherprune.losses import LossFn, checked_loss, sample_losses
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
            the model's device. The global random state is put back after the pass: two
            passes over a shuffling DataLoader see the samples in the same order.
        loss_fn: ``(outputs, labels) -> loss``, cross-entropy by default. The loss of a
            sample is ``loss_fn`` of the batch made of it alone, summed up: so mean and
            sum over the *samples* mean the same. A mean over a sample's positions stays
            one, as does a mean over the positions that ``ignore_index`` leaves; class
            weights need ``reduction="sum"``.
        group_size: samples whose mean gradient is squared as one; 1 is the exact
            empirical Fisher diagonal.
        parameters: by name, ``prunable_parameters(model)`` by default; of Conv1d,
            Conv2d, Linear and BatchNorm layers, weights and biases.

    Returns:
        The moments. A parameter that no loss reaches has zeros, and F is 0 where a
        gradient's magnitude is below 1e-19, of which the square is no float32 number.

    Raises:
        FisherpruneError: where the data is empty or labels are out of range, a loss or
            gradient is not finite, samples mix (seen in the last sample of the first
            batch that has two), activations are checkpointed, or a parameter is frozen,
            hooked, not float32 or used outside of the supported layers.

    Reference:
        Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
        Gradient Descent", 2019, for F.
    """
    parameters, loss_fn = checked_parameters(model, parameters), checked_loss(loss_fn)
    check_unhooked(parameters)
    model = eager(model)
    group_size, checked = checked_group_size(group_size), False
    with evaluating(model):
        moments = BatchedMoments(parameters, group_size)
        for inputs, labels in checked_batches(batches, device_of(parameters)):
            moments.begin(len(inputs))
            tap = LayerTap(model, parameters, len(inputs), moments.add)
            with tap.forward():
                outputs = model(inputs)
                losses = sample_losses(outputs, labels, loss_fn)
            if not checked and len(inputs) > 1:
                _check_samples_apart(model, inputs, outputs.detach(), parameters)
                checked = True
            tap.backward(losses.sum())
            moments.end()
        samples, groups = moments.groups.samples, moments.groups.count
        if samples == 0:
            raise FisherpruneError(
                "gradient_moments: batches must hold samples, got none"
            )
        mean, fisher = moments.means()
    check_finite(fisher, "the mean squared gradient")  # then the mean is finite too
    return GradientMoments(mean, fisher, samples, groups, group_size)


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


def _check_samples_apart(model, inputs, outputs, parameters) -> None:
    """Run the last sample alone: its layers and its output must be the same.

    The last: what a sequence, a queue or a limited capacity makes of a sample depends
    on those before it.
    """
    tap = LayerTap(model, parameters, 1, report=None)  # checks the layers' inputs
    with tap.forward():
        alone = model(inputs[-1:]).float()
    together = outputs[-1:].float()
    same = alone.shape == together.shape
    if not same or (alone - together).norm() > _tolerance(outputs) * together.norm():
        raise FisherpruneError(
            "gradient_moments: samples mix: the model's output for a sample alone is "
            "another than in a batch (or it is random in eval mode)"
        )


def _tolerance(outputs: Tensor) -> float:
    """Return the relative error that other kernels for one sample may cause."""
    if outputs.dtype != torch.float32:
        return 5e-2
    backends = torch.backends
    if outputs.is_cuda:
        used = backends.cuda.matmul, backends.cudnn.conv
    else:
        used = backends.mkldnn.matmul, backends.mkldnn.conv
    reduced = {"tf32": 1e-2, "bf16": 5e-2}
    return max(reduced.get(backend.fp32_precision, 1e-3) for backend in used)


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
    parameters, loss_fn = checked_parameters(model, parameters), checked_loss(loss_fn)
    model = eager(model)
    weights = list(parameters.values())
    vector = [moments.mean[name] for name in parameters]
    seen = 0
    # Attention's fused kernels have no second derivative.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        product = [torch.zeros_like(w) for w in weights]
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
