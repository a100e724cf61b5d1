"""The exact diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import Parameters, check_finite
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.driver import PerSampleSums, tapped_passes
from fisherprune.statistics.forward import of_outputs
from fisherprune.statistics.losses import checked_outputs
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.protect import evaluating


def gauss_newton_diagonal(
    model: nn.Module,
    batches: Batches,
    *,
    parameters: Parameters | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    r"""Compute the diagonal of the generalized Gauss-Newton matrix, exactly.

    .. math:: \frac1N \sum_n J_n^\top (\mathrm{diag}(p_n) - p_n p_n^\top) J_n

    for cross-entropy over N samples, with :math:`J_n` the Jacobian of the sample's C
    class scores and :math:`p_n` their softmax. It is also the diagonal of the Fisher
    information under the model's own labels: no label is read. Of a network of linear
    layers, convolutions, BatchNorm in eval mode, ReLU and max-pooling that uses each
    weight in one call it is the exact diagonal of the Hessian, for its class scores are
    piecewise linear in every single weight.

    It costs a forward pass and C - 1 backward passes. Squares are summed up during
    each of these, so they take no memory.

    Args:
        model: float32 module with class scores ``[N, C]`` as its output; runs in eval
            mode, and its samples must not mix.
        batches: iterable of ``(inputs, labels)``, samples first.
        parameters: as in ``gradient_moments``.
        progress: whether to show a bar over the batches, with tqdm, on stderr.

    Returns:
        The diagonal by parameter name, float32, of the parameters' shapes.

    Raises:
        FisherpruneError: where the output is not ``[N, C]`` with at least two classes,
            and for any reason of ``gradient_moments``.

    Reference:
        Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient
        Descent", 2002; Dangel et al., "BackPACK", 2020.
    """
    task = checked_task(model, batches, parameters, progress=progress)
    return dict(gauss_newton_pass(task).parts["H"])


def _check_loss(task: Task) -> None:
    if task.loss_fn is not None or task.losses is not None:
        raise FisherpruneError(
            "loss_fn and losses must be left out for the Gauss-Newton diagonal "
            "(criterion obd), which is that of cross-entropy"
        )


@register_pass("gauss_newton", yields=("H",), check=_check_loss)
def gauss_newton_pass(task: Task) -> ModelStatistics:
    """Yield the diagonal; the group size plays no part in it."""
    op, classes = "gauss_newton_diagonal", 2
    sums = PerSampleSums(task, group_size=1)
    with evaluating(task.model, task.parameters.values()):
        for each in tapped_passes(op, task, of_outputs(_class_scores), sums):
            scores, classes = each.result, each.result.shape[1]
            for c, column in enumerate(softmax_hessian_root(scores.detach())):
                loss = (scores.float() * column).sum()
                each.backward(loss, again=c < classes - 2)
        samples = sums.samples // (classes - 1)
        _, squares = sums.sums()
        for diagonal in squares.values():
            diagonal.div_(samples)
    check_finite(squares, "the Gauss-Newton diagonal")
    return ModelStatistics({"H": squares}, samples, task.group_size)


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


def softmax_hessian_root(scores: Tensor) -> Iterator[Tensor]:
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
