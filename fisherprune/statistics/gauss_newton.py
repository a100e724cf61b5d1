"""The diagonal of the generalized Gauss-Newton matrix: exact, and estimated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fisherprune.errors import FieldError
from fisherprune.parameters import Parameters, check_finite
from fisherprune.statistics.accumulators import bytes_a_weight
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.driver import LoneSample, TappedBatch, tapped_passes
from fisherprune.statistics.estimates import Estimate, estimate_of
from fisherprune.statistics.forward import of_likelihoods
from fisherprune.statistics.known_losses import Reader, reader_of
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.parts import in_parts
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.ranks import own_name, together
from fisherprune.statistics.sample_streams import SampleStreams
from fisherprune.statistics.scale import in_range, scaled, shifted
from fisherprune.statistics.settings import Settings, checked_number
from fisherprune.statistics.sums import PerSampleSums, Summed
from fisherprune.streams import stream_seed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "gauss_newton_diagonal"
DIAGONAL = "the Gauss-Newton diagonal"
"""What errors call it."""

MOST_COLUMNS = 4096
"""Backward passes for a batch, above which the exact diagonal is refused."""


def gauss_newton_diagonal(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    losses: Losses | None = None,
    parameters: Parameters | None = None,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
    max_accumulator_bytes: int | None = None,
    offload: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    r"""Compute the diagonal of the generalized Gauss-Newton matrix, exactly.

    .. math:: \frac1N \sum_n J_n^\top H_n J_n

    over N samples, with :math:`J_n` the Jacobian of the sample's outputs and
    :math:`H_n` the Hessian of its loss with respect to them:

    - cross-entropy: :math:`\mathrm{diag}(p) - p p^\top` with p the softmax of the C
      class scores, for each of T positions; times 1 / T for a mean over these. No label
      is read but for which positions count and for class weights;
    - squared error: 2 for each of K outputs, and binary cross-entropy with logits:
      :math:`p (1 - p)`; times 1 / K for a mean over these.

    For cross-entropy of one position it is also the diagonal of the Fisher information
    under the model's own labels. Of a network of linear layers, convolutions, BatchNorm
    in eval mode, ReLU and max-pooling that uses each weight in one call it is the exact
    diagonal of the Hessian, for its outputs are piecewise linear in every single
    weight.

    It costs a forward pass and T (C - 1) or K backward passes. Squares are summed up
    during each of these, so they take no memory. Where that are too many,
    ``gauss_newton_estimate`` takes as many as it is told.

    Args:
        model: runs in eval mode, and its samples must not mix.
        batches: as in ``gradient_moments``.
        loss_fn: cross-entropy of outputs ``[N, C, *]`` by default;
            ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss`` or their
            functions in ``torch.nn.functional``.
        losses: in its place, of ``fisherprune.losses`` but ``hugging_face``.
        parameters: as in ``gradient_moments``.
        progress: whether to show a bar over the batches, with tqdm, on stderr.
        process_group: as in ``gradient_moments``.
        max_accumulator_bytes: as in ``gradient_moments``, of 24 bytes a weight.
        offload: as in ``gradient_moments``: where the diagonal is kept.

    Returns:
        The diagonal by parameter name, float32, of the parameters' shapes; 0 where
        float32 can't hold it, though criterion obd counts it.

    Raises:
        FisherpruneError: where nothing is known of the loss's Hessian, a batch needs
            more than 4,096 backward passes, the outputs don't fit the loss, or for any
            reason of ``gradient_moments``.

    Reference:
        Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient
        Descent", 2002; Dangel et al., "BackPACK", 2020.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Linear(4, 2)
        >>> batches = [(torch.ones(8, 4), torch.randn(8, 2))]
        >>> named = dict(model.named_parameters())
        >>> mse = torch.nn.functional.mse_loss
        >>> found = fisherprune.gauss_newton_diagonal(
        ...     model, batches, mse, parameters=named
        ... )
        >>> found["bias"]
        tensor([1., 1.])
    """
    with together(process_group):
        settings = Settings(
            max_accumulator_bytes=max_accumulator_bytes, offload=offload
        )
        options = loss_fn, 1, progress, losses, settings, 0, process_group
        task = agreed(checked_task(model, batches, parameters, *options))
        found = gauss_newton_pass(task)
        diagonal = shifted(found.parts["H"], -found.exponents.get("H", 0))
        check_finite(diagonal, DIAGONAL)
    return diagonal


def gauss_newton_estimate(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    draws: int = 16,
    seed: int = 0,
    losses: Losses | None = None,
    parameters: Parameters | None = None,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
) -> Estimate:
    r"""Estimate the diagonal of the Gauss-Newton matrix from random signs.

    .. math:: \frac1N \sum_n \frac1K \sum_{k=1}^K \bigl(J_n^\top S_n z_{nk}\bigr)^2,
        \qquad S_n S_n^\top = H_n

    with z independent signs, 1 or -1 each as often: its expectation is
    ``gauss_newton_diagonal``. A single draw of a sample has at most the variance
    :math:`2 h^2` around its value h, none at all where S has one column (two classes,
    one output). Labels that are drawn from the model, as in ``gradient_moments``, have
    the same expectation for cross-entropy, but a variance that grows as one over the
    probability of rare labels.

    It costs a forward pass and K backward passes, whatever the number of classes and
    positions, and 8 K bytes a weight, for the standard error. Criterion obd takes this
    estimate where ``Settings.draws`` is given, with 8 bytes a weight.

    Args:
        model: as in ``gauss_newton_diagonal``.
        batches: as in ``gauss_newton_diagonal``.
        loss_fn: as in ``gauss_newton_diagonal``.
        draws: K, at least 2.
        seed: of the signs. Those of a sample depend on its number among all samples,
            not on batches.
        losses: as in ``gauss_newton_diagonal``.
        parameters: as in ``gradient_moments``.
        progress: whether to show a bar over the batches, with tqdm, on stderr.
        process_group: as in ``gradient_moments``; ranks draw different signs.

    Returns:
        The estimate and its standard error by parameter name.

    Raises:
        FisherpruneError: for any reason of ``gauss_newton_diagonal`` but the number of
            backward passes.

    Reference:
        Dangel et al., "BackPACK", 2020, for roots and draws; Hutchinson, "A Stochastic
        Estimator of the Trace of the Influence Matrix", 1989, for signs.
    """
    with together(process_group):
        settings = Settings(draws=checked_number("draws", draws, 2))
        options = loss_fn, 1, progress, losses, settings, seed, process_group
        task = agreed(checked_task(model, batches, parameters, *options))
        found, exponent = _summed(task, several=draws)
        each = [shifted(squares, -2 * exponent) for squares in found.apart]
        return estimate_of(each, DIAGONAL, 1 / found.samples)


def _reader(task: Task) -> Reader:
    return reader_of(OP, task, f"{DIAGONAL} (criterion obd)")


def _check_loss(task: Task) -> None:
    _reader(task)


@register_pass(
    "gauss_newton",
    yields=("H",),
    check=_check_loss,
    over_ranks=True,
    in_shards=True,
    offloads=True,
)
def gauss_newton_pass(task: Task) -> ModelStatistics:
    """Yield the diagonal, exact or estimated; the group size plays no part in it."""
    found, exponent = _summed(task)
    for diagonal in found.squares.values():
        diagonal.div_(found.samples * (task.settings.draws or 1))
    result = ModelStatistics({"H": found.squares}, found.samples, task.group_size)
    return result.scaled(H=2 * exponent)


def _summed(task: Task, several: int = 1) -> tuple[Summed, int]:
    """Pass over the batches; return the sums, and the exponent of their losses."""

    def run(exponent: int) -> Summed:
        one = partial(_pass, exponent=exponent, several=several)
        return Summed.of_parts(task, in_parts(OP, task, bytes_a_weight(1), one))

    return in_range(OP, DIAGONAL, task.batches, run)


def _pass(task: Task, exponent: int, several: int) -> Summed:
    """Go backward from the columns of each batch, turning to several sums in turn."""
    forward = of_likelihoods(OP, _reader(task), losses=False)
    sums = PerSampleSums(task, 1, exponent != 0, several)
    with evaluating(task.model, task.parameters.values()):
        for each in tapped_passes(OP, task, forward, sums):
            count, columns = _columns(each, task)
            outputs = each.result.float()
            for k, column in enumerate(columns):
                sums.choose(k % several)
                loss = scaled((outputs * column).sum(), exponent)
                each.backward(loss, again=k < count - 1)
    return sums.add_ranks(OP, task).summed(apart=several > 1)


def _columns(
    each: TappedBatch | LoneSample, task: Task
) -> tuple[int, Iterator[Tensor]]:
    """Return how many columns, and the columns: of a root, or drawn."""
    likelihood, draws = each.ran.likelihood, task.settings.draws
    if draws is not None:
        seed = stream_seed(task.seed, own_name(DIAGONAL, task.process_group))
        streams = (SampleStreams(seed, each.first, k) for k in range(draws))
        return draws, (likelihood.drawn_root(numbers) for numbers in streams)
    if likelihood.columns > MOST_COLUMNS:
        wanted = (
            f"at most {MOST_COLUMNS} for the exact diagonal; estimate it with "
            "gauss_newton_estimate or Settings(draws=...)"
        )
        raise FieldError(
            f"{OP}: backward passes of a batch", wanted, likelihood.columns
        )
    return likelihood.columns, likelihood.roots()
