"""The statistics pass of first order: gradient moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError
from fisherprune.parameters import Parameters, check_finite
from fisherprune.statistics.accumulators import Sums
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.driver import PerSampleSums, tapped_passes
from fisherprune.statistics.forward import of_losses
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.protect import evaluating


@dataclass(frozen=True, eq=False)
class GradientMoments:
    r"""First and second moments of the group gradients :math:`G_1 ... G_J`.

    Kept as sums and counts, so moments of different samples add up: ``a + b`` holds
    those of the samples of both, and shards of the data may be passed over one by one.

    Attributes:
        sum: :math:`\sum_j G_j` by parameter name, float32.
        sum_sq: :math:`\sum_j G_j \odot G_j`, by parameter name, float32.
        samples: number of samples seen.
        groups: J.
        group_size: samples averaged in one group.
        paths: by parameter name, in which ways its gradients were found: the names of
            functions for whose calls there is a rule ("linear", "conv2d", ...), "vmap"
            where a function without one was differentiated for each sample, "loop"
            where the whole model was; none where no loss depends on it.
    """

    sum: Sums
    sum_sq: Sums
    samples: int
    groups: int
    group_size: int
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        r""":math:`m = \frac1J \sum_j G_j` by parameter name, float32."""
        return _divided(self.sum, self.groups)

    @cached_property
    def fisher(self) -> dict[str, Tensor]:
        r""":math:`F = \frac1J \sum_j G_j \odot G_j`, the mean squared gradients.

        By parameter name, float32; the empirical Fisher diagonal where the group size
        is 1.
        """
        return _divided(self.sum_sq, self.groups)

    def __add__(self, other: GradientMoments) -> GradientMoments:
        """Return the moments of the samples of both, on the devices of the left side.

        Groups stay what they are: a partial last group of the left side counts as one.
        So the sum is that of a single pass where the left side's samples are a multiple
        of the group size.

        Raises:
            FisherpruneError: where the group sizes differ, or names or shapes of the
                parameters.
        """
        if not isinstance(other, GradientMoments):
            return NotImplemented
        ours, theirs = (
            {"group_size": m.group_size} | {n: [*s.shape] for n, s in m.sum.items()}
            for m in (self, other)
        )
        for what in ours | theirs:
            if ours.get(what) != theirs.get(what):
                wanted = f"{ours.get(what)} on both sides of +"
                raise FieldError(f"GradientMoments: {what}", wanted, theirs.get(what))
        return GradientMoments(
            {n: sum + other.sum[n].to(sum.device) for n, sum in self.sum.items()},
            {n: sum + other.sum_sq[n].to(sum.device) for n, sum in self.sum_sq.items()},
            self.samples + other.samples,
            self.groups + other.groups,
            self.group_size,
            {
                n: tuple(sorted({*self.paths.get(n, ()), *other.paths.get(n, ())}))
                for n in self.sum
            },
        )

    @property
    def statistics(self) -> ModelStatistics:
        """Return what formulas and other passes read."""
        parts = {"m": self.mean, "F": self.fisher}
        return ModelStatistics(parts, self.samples, self.group_size)


@torch.inference_mode(False)  # autograd may save what is not made in inference mode
def _divided(sums: Sums, groups: int) -> dict[str, Tensor]:
    return {name: sum / groups for name, sum in sums.items()}


def gradient_moments(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    losses: Losses | None = None,
    group_size: int = 1,
    parameters: Parameters | None = None,
    progress: bool = False,
) -> GradientMoments:
    r"""Compute mean and mean square of the per-sample gradients, exactly, in one pass.

    With :math:`L_j` the mean loss of the j-th ``group_size`` consecutive samples
    (groups run on across batches, the last may be smaller and counts like others) and
    :math:`G_j` its gradient, returns :math:`m = \frac1J \sum_j G_j` and
    :math:`F = \frac1J \sum_j G_j \odot G_j`. The result does not depend on the batch
    size, and no per-sample gradient of a weight is ever stored. The sums take 8 bytes a
    weight, and 16 more once there are more than 512 groups: blocks of so many are added
    up in float64, so a million samples lose no more digits than 512.

    Args:
        model: any module; runs in eval mode, and its samples must not mix. Weights may
            be of any floating-point dtype: gradients are those of the model's own
            arithmetic, added up in float32.
        batches: iterable of ``(inputs, labels)``, samples first, or with ``losses`` of
            batches of any structure; tensors are moved to the model's device. The
            global random state is put back after the pass: two passes over a shuffling
            DataLoader see the samples in the same order.
        loss_fn: ``(outputs, labels) -> loss``, cross-entropy by default. The loss of a
            sample is ``loss_fn`` of the batch made of it alone, summed up: so mean and
            sum over the *samples* mean the same. A mean over a sample's positions stays
            one, as does a mean over the positions that ``ignore_index`` leaves; class
            weights need ``reduction="sum"``.
        losses: in place of ``loss_fn``, ``(model, batch) -> losses``, one for each of
            the batch's samples, ``[N]``: it runs the model itself, so batches may be
            dictionaries, tuples, data classes. ``fisherprune.losses`` has the usual.
        group_size: samples whose mean gradient is squared as one; 1 is the exact
            empirical Fisher diagonal.
        parameters: by name, ``prunable_parameters(model)`` by default; any that the
            losses depend on, frozen ones too. ``paths`` of the result says in which way
            the gradients of each were found.
        progress: whether to show a bar over the batches, with tqdm, on stderr.

    Passes of several threads run one after the other, whatever their models: a pass
    holds what is the process's. Ctrl-C takes effect at the next batch.

    Returns:
        The moments. They are zero for a parameter on which no loss depends, and F is 0
        where all gradients are smaller than 1e-19: float32 can't hold their squares.

    Raises:
        FisherpruneError: where the data is empty or labels are out of range, a loss or
            gradient is not finite, samples mix (seen in the last sample of the first
            batch that has two), activations are checkpointed, or a parameter is hooked
            or not of real floating-point numbers.

    Reference:
        Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
        Gradient Descent", 2019, for F.
    """
    options = loss_fn, group_size, progress, losses
    return _gradient_moments(checked_task(model, batches, parameters, *options))


@register_pass("moments", yields=("m", "F"))
def moments_pass(task: Task) -> ModelStatistics:
    """Yield the mean gradient and the Fisher diagonal."""
    return _gradient_moments(task).statistics


def _gradient_moments(task: Task) -> GradientMoments:
    sums = PerSampleSums(task, task.group_size)
    forward = of_losses(task)
    with evaluating(task.model, task.parameters.values()):
        for each in tapped_passes("gradient_moments", task, forward, sums):
            each.backward(each.result.sum())
        sum, sum_sq = sums.sums()
    check_finite(sum_sq, "the mean squared gradient")  # then the mean is finite too
    counts = sums.samples, sums.groups, task.group_size
    return GradientMoments(sum, sum_sq, *counts, sums.paths)
