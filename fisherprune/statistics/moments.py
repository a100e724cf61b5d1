"""The statistics pass of first order: gradient moments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import (
    Parameters,
    check_finite,
    checked_parameters,
    eager,
)
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.driver import tapped_passes
from fisherprune.statistics.groups import BatchedMoments
from fisherprune.statistics.losses import LossFn, checked_loss, sample_losses
from fisherprune.statistics.protect import evaluating


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
