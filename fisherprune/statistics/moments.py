"""The statistics pass of first order, gradient moments, and how a tapped pass runs.

A pass is slow and written once; what a criterion makes of it stands in ``criteria.py``.
All passes run the model in eval mode, where samples do not mix, and leave weights,
gradients, modes, buffers, hooks and the global random state as they found them. Those
of second order stand in ``curvature.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherprune.accumulators import BatchedMoments
from fisherprune.contributions import Contribution
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
    group_size = checked_group_size(group_size)
    moments = BatchedMoments(parameters, group_size)

    def losses_of(outputs: Tensor, labels: Tensor) -> Tensor:
        return sample_losses(outputs, labels, loss_fn)

    op, model = "gradient_moments", eager(model)
    with evaluating(model):
        for tap, n, losses in tapped_passes(
            op, model, batches, parameters, losses_of, moments.add
        ):
            moments.begin(n)
            tap.backward(losses.sum())
            moments.end()
        samples, groups = moments.groups.samples, moments.groups.count
        mean, fisher = moments.means()
    check_finite(fisher, "the mean squared gradient")  # then the mean is finite too
    return GradientMoments(mean, fisher, samples, groups, group_size)


def tapped_passes(
    op: str,
    model: nn.Module,
    batches: Batches,
    parameters: Parameters,
    head: Callable[[Tensor, Tensor], Tensor],
    report: Callable[[str, Contribution], None],
) -> Iterator[tuple[LayerTap, int, Tensor]]:
    """Run the forward pass of each batch; what goes backward is the caller's.

    Args:
        op: named in errors.
        model: within ``evaluating``.
        batches: iterable of ``(inputs, labels)``.
        parameters: the watched parameters by name.
        head: ``(outputs, labels) -> Tensor``, what the caller goes backward from.
        report: as of ``LayerTap``.

    Yields:
        the tap, the number of samples, and what ``head`` returned.

    Raises:
        FisherpruneError: where there is no batch, samples mix, or a parameter is hooked
            or used outside of the supported layers.
    """
    check_unhooked(parameters)
    empty, checked = True, False
    for inputs, labels in checked_batches(batches, device_of(parameters)):
        empty, n = False, len(inputs)
        check = not checked and n > 1
        # First: what its forward pass changes, the batch's graph may not have saved.
        one = _run_last(op, model, inputs, labels, parameters, head) if check else None
        tap = LayerTap(model, parameters, n, report, op, keep_last=check)
        with tap.forward():
            outputs = model(inputs)
            result = head(outputs, labels)
        if isinstance(one, FisherpruneError):
            raise one  # the whole batch runs
        if one is not None:
            _check_apart(op, one, _Seen(outputs, result, tap.last_inputs))
            tap.last_inputs, checked, one = [], True, None
        yield tap, n, result
    if empty:
        raise FisherpruneError(f"{op}: batches must hold samples, got none")


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


@dataclass(frozen=True)
class _Seen:
    """What a forward pass came to: outputs, the head's result, calls' last inputs."""

    outputs: Tensor
    result: Tensor
    last_inputs: list[Tensor]


def _run_last(op, model, inputs, labels, parameters, head) -> _Seen | FisherpruneError:
    """Run the last sample alone; return why where that fails.

    The last: what a sequence, a queue or a limited capacity makes of a sample depends
    on those before it.
    """
    tap = LayerTap(model, parameters, 1, None, op, keep_last=True)
    try:
        with tap.forward():
            outputs = model(inputs[-1:].clone())
            result = head(outputs, labels[-1:])
    except Exception as error:
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        failure = FisherpruneError(
            f"{op}: the model must run with one sample, by which is seen whether "
            f"samples mix; alone, the last of the first batch fails: {reason}"
        )
        failure.__cause__ = error
        return failure
    return _Seen(outputs.detach(), result.detach(), tap.last_inputs)


def _check_apart(op: str, alone: _Seen, together: _Seen) -> None:
    """Refuse where the last sample is another alone than in its batch.

    A small loss, or a layer's input that is nearly zero, has the rounding errors of the
    larger numbers that it is made of.
    """
    size = float(together.outputs[-1].detach().float().norm())
    inputs = max((float(x.float().norm()) for x in together.last_inputs), default=0.0)
    pairs = [
        ("the model's output for", 0.0, alone.outputs[-1], together.outputs[-1]),
        ("the loss of", size, alone.result[-1], together.result[-1]),
    ]
    calls = zip(alone.last_inputs, together.last_inputs, strict=False)
    pairs += [("what a layer reads of", 1e-3 * inputs, *pair) for pair in calls]
    tolerance = _tolerance(together.outputs)
    for what, least, one, other in pairs:
        if not _is_same(one.detach().float(), other.detach().float(), tolerance, least):
            raise FisherpruneError(
                f"{op}: samples mix: {what} a sample alone is another than in a batch "
                "(or it is random in eval mode, or samples change places on the way)"
            )


def _is_same(one: Tensor, other: Tensor, tolerance: float, least: float) -> bool:
    same = one.shape == other.shape
    return same and not (one - other).norm() > tolerance * (other.norm() + least)


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
