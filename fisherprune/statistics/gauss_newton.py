"""The statistics passes of second order.

Like those of ``stats.py`` they leave everything as they found it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherprune.accumulators import BatchedMoments
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
from fisherprune.losses import (
    LossFn,
    checked_loss,
    checked_outputs,
    sample_losses,
)
from fisherprune.stats import GradientMoments, tapped_passes

GRADIENT_TOLERANCE = 5e-2
"""Of the same gradient found twice, where TF32 or bfloat16 may be at work."""


def gauss_newton_diagonal(
    model: nn.Module, batches: Batches, *, parameters: Parameters | None = None
) -> dict[str, Tensor]:
    r"""Compute the diagonal of the generalized Gauss-Newton matrix, exactly.

    .. math:: \frac1N \sum_n J_n^\top (\mathrm{diag}(p_n) - p_n p_n^\top) J_n

    for cross-entropy over N samples, with :math:`J_n` the Jacobian of the sample's C
    class scores and :math:`p_n` their softmax. It is also the diagonal of the Fisher
    information under the model's own labels: no label is read. Of a network of linear
    layers, convolutions, BatchNorm in eval mode, ReLU and max-pooling that uses each
    weight in one call it is the exact diagonal of the Hessian, for its class scores are
    piecewise linear in every single weight.

    Costs a forward pass and C - 1 backward passes with the squares of each summed up on
    the way, and no memory for them.

    Args:
        model: float32 module with class scores ``[N, C]`` as its output; runs in eval
            mode, and its samples must not mix.
        batches: iterable of ``(inputs, labels)``, samples first.
        parameters: as in ``gradient_moments``.

    Returns:
        The diagonal by parameter name, float32, of the parameters' shapes.

    Raises:
        FisherpruneError: where the output is not ``[N, C]`` with at least two classes,
            and for any reason of ``gradient_moments``.

    Reference:
        Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient
        Descent", 2002; Dangel et al., "BackPACK", 2020.
    """
    return gauss_newton_pass(model, batches, parameters)[0]


def gauss_newton_pass(
    model: nn.Module, batches: Batches, parameters: Parameters | None = None
) -> tuple[dict[str, Tensor], int]:
    """Return ``gauss_newton_diagonal`` and the number of samples seen."""
    parameters, samples = checked_parameters(model, parameters), 0
    moments = BatchedMoments(parameters, group_size=1)
    op, model = "gauss_newton_diagonal", eager(model)
    with evaluating(model):
        for tap, n, scores in tapped_passes(
            op, model, batches, parameters, _class_scores, moments.add
        ):
            samples += n
            last = scores.shape[1] - 2
            for c, column in enumerate(_softmax_hessian_root(scores.detach())):
                moments.begin(n)
                tap.backward((scores.float() * column).sum(), again=c < last)
                moments.end()
        columns = moments.groups.samples  # of all samples' roots
        _, squares = moments.means()
        diagonal = {name: s.mul_(columns / samples) for name, s in squares.items()}
    check_finite(diagonal, "the Gauss-Newton diagonal")
    return diagonal, samples


def _class_scores(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the model's outputs if they are class scores of the batch."""
    op, shape = "gauss_newton_diagonal", list(checked_outputs(outputs, labels).shape)
    if len(shape) != 2 or shape[1] < 2:
        raise FisherpruneError(
            f"{op}: the model's output must be scores of at least two classes, "
            f"[N, classes], got {shape}"
        )
    if not outputs.requires_grad:
        raise FisherpruneError(
            f"{op}: the model's output must depend on a parameter of the model"
        )
    finite = outputs.detach().isfinite().all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0, 0])
        raise FisherpruneError(
            f"{op}: the model's output must be finite, got "
            f"{outputs[bad].tolist()} for sample {bad} of a batch"
        )
    return outputs


def _softmax_hessian_root(scores: Tensor) -> Iterator[Tensor]:
    r"""Yield the columns of S with :math:`S S^\top = \mathrm{diag}(p) - p p^\top`.

    Gaussian elimination in closed form: with :math:`r_c = \sum_{j > c} p_j`, column c
    is :math:`\sqrt{p_c r_c / r_{c-1}}` times 1 at c and :math:`-p_j / r_c` at j > c.
    The last one would be zero.

    Args:
        scores: ``[N, C]``.

    Yields:
        C - 1 columns ``[N, C]``, float32.
    """
    p = scores.double().softmax(1)
    rest = p.flip(1).cumsum(1).flip(1)  # r_{c-1} at c
    for c in range(p.shape[1] - 1):
        after = rest[:, c + 1 :][:, :1]
        column = torch.zeros_like(p)
        column[:, c] = 1
        column[:, c + 1 :] = -p[:, c + 1 :] / after
        column *= (p[:, c : c + 1] * after / rest[:, c : c + 1]).sqrt()
        # What is left of the probabilities may be too small for any number.
        yield column.where(after > 0, 0).float()


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
