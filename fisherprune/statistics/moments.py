"""The statistics pass of first order: gradient moments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, shown
from fisherprune.parameters import Parameters, check_finite
from fisherprune.statistics.accumulators import Sums
from fisherprune.statistics.alike import check_alike
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.driver import tapped_passes
from fisherprune.statistics.forward import of_likelihoods, of_losses
from fisherprune.statistics.known_losses import Reader, reader_of
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.moments_files import (
    SHARD_BYTES,
    read_moments,
    write_moments,
)
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.ranks import together
from fisherprune.statistics.sampled_labels import SampledSums
from fisherprune.statistics.scale import (
    in_range,
    lost,
    scaled,
    shifted,
    warn_of_lost,
)
from fisherprune.statistics.settings import Settings
from fisherprune.statistics.sums import PerSampleSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FISHER = "the mean squared gradient"
"""What errors call F."""
FACTS = ("samples", "groups", "group_size", "exponent", "labels", "paths")
"""What files of moments hold beside tensors and provenance."""


@dataclass(frozen=True, eq=False)
class GradientMoments:
    r"""First and second moments of the group gradients :math:`G_1 ... G_J`.

    Kept as sums and counts, so moments of different samples add up: ``a + b`` holds
    those of the samples of both, and shards of the data may be passed over one by one.

    Attributes:
        sum: :math:`\sum_j G_j` by parameter name, float32; times ``2**exponent``.
        sum_sq: :math:`\sum_j G_j \odot G_j`, by parameter name, float32; times
            ``4**exponent``.
        samples: number of samples seen.
        groups: J.
        group_size: samples averaged in one group.
        paths: by parameter name, in which ways its gradients were found: the names of
            functions for whose calls there is a rule ("linear", "conv2d", ...), "vmap"
            where a function without one was differentiated for each sample, "loop"
            where the whole model was; none where no loss depends on it.
        exponent: 0 but where float32 could not hold the squares as they are.
        labels: of ``sum_sq``, "given" or "sampled"; those of ``sum`` are given.
        provenance: what was said of these samples where they were saved, one record for
            each ``save`` that was given one; those of both sides of ``+``.
    """

    sum: Sums
    sum_sq: Sums
    samples: int
    groups: int
    group_size: int
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    exponent: int = 0
    labels: str = "given"
    provenance: tuple[Mapping[str, object], ...] = ()

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        r""":math:`m = \frac1J \sum_j G_j` by parameter name, float32."""
        return shifted(_divided(self.sum, self.groups), -self.exponent)

    @cached_property
    def fisher(self) -> dict[str, Tensor]:
        r""":math:`F = \frac1J \sum_j G_j \odot G_j`, the mean squared gradients.

        By parameter name, float32; the empirical Fisher diagonal where the group size
        is 1. It is 0 where float32 can't hold it.
        """
        return shifted(_divided(self.sum_sq, self.groups), -2 * self.exponent)

    def __add__(self, other: GradientMoments) -> GradientMoments:
        """Return the moments of the samples of both, on the devices of the left side.

        Groups stay what they are: a partial last group of the left side counts as one.
        So the sum is that of a single pass where the left side's samples are a multiple
        of the group size.

        Raises:
            FisherpruneError: where group sizes or labels differ, or names or shapes of
                the parameters.
        """
        if not isinstance(other, GradientMoments):
            return NotImplemented
        ours, theirs = (
            {"group_size": m.group_size, "labels": m.labels}
            | {n: [*s.shape] for n, s in m.sum.items()}
            for m in (self, other)
        )
        for what in ours | theirs:
            if ours.get(what) != theirs.get(what):
                wanted = f"{ours.get(what)} on both sides of +"
                raise FieldError(f"GradientMoments: {what}", wanted, theirs.get(what))
        exponent = min(self.exponent, other.exponent)  # with which both are in range
        (sums, squares), (more_sums, more_squares) = (
            (shifted(m.sum, by), shifted(m.sum_sq, 2 * by))
            for m in (self, other)
            for by in [exponent - m.exponent]
        )
        return GradientMoments(
            {n: sum + more_sums[n].to(sum.device) for n, sum in sums.items()},
            {n: sum + more_squares[n].to(sum.device) for n, sum in squares.items()},
            self.samples + other.samples,
            self.groups + other.groups,
            self.group_size,
            {
                n: tuple(sorted({*self.paths.get(n, ()), *other.paths.get(n, ())}))
                for n in self.sum
            },
            exponent,
            self.labels,
            (*self.provenance, *other.provenance),
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        provenance: Mapping[str, object] | None = None,
        max_shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the moments to a safetensors file, whole or not at all.

        Its tensors are ``sum/NAME`` and ``sum_sq/NAME``; counts, ways and versions are
        in its metadata. Where it would be larger than ``max_shard_bytes`` there are
        several files instead, and ``PATH.index.json`` in Hugging Face's layout, which
        is written last. Moments that were at ``path`` before are replaced.

        Args:
            path: of the file, ``NAME.safetensors`` say.
            provenance: which model, data and loss they are of: anything that JSON can
                hold, by name.
            max_shard_bytes: bytes of tensors in one file; a larger tensor has a file
                alone.

        Raises:
            FisherpruneError: where an argument can't be used, or an index that is not
                of moments is in the way.
            OSError: where the folder is missing, not writable or full.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
            >>> batches = [(torch.randn(16, 5), torch.randint(3, (16,)))]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = f"{folder}/moments.safetensors"
            ...     gradient_moments(net, batches).save(path, provenance={"data": "A"})
            ...     found = GradientMoments.load(path)
            >>> found.samples, found.provenance
            (16, ({'data': 'A'},))
        """
        if not isinstance(provenance, Mapping | None):
            wanted = "a dict of what JSON can hold"
            raise FieldError("save: provenance", wanted, shown(provenance))
        records = [*self.provenance, *([provenance] if provenance else [])]
        facts = {name: getattr(self, name) for name in FACTS}
        facts["provenance"] = [dict(record) for record in records]
        parts = {"sum": self.sum, "sum_sq": self.sum_sq}
        write_moments(path, parts, facts, max_shard_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradientMoments:
        """Read what ``save`` wrote, onto the CPU; every bit is checked.

        Args:
            path: as it was saved, or of the index of several files.

        Raises:
            FisherpruneError: where a file is missing, damaged or holds something else.
        """
        parts, facts = read_moments(path)
        sums = parts["sum"], parts["sum_sq"]
        found = cls(*sums, **{name: facts[name] for name in FACTS})
        paths = {name: tuple(ways) for name, ways in found.paths.items()}
        return replace(found, paths=paths, provenance=tuple(facts["provenance"]))

    @property
    def statistics(self) -> ModelStatistics:
        """Return what formulas and other passes read."""
        if self.exponent:
            means, squares = (_divided(s, self.groups) for s in (self.sum, self.sum_sq))
        else:
            means, squares = self.mean, self.fisher
        found = ModelStatistics(
            {"m": means, "F": squares}, self.samples, self.group_size
        )
        return found.scaled(m=self.exponent, F=2 * self.exponent)


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
    labels: str = "given",
    draws: int = 1,
    seed: int = 0,
    parameters: Parameters | None = None,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
) -> GradientMoments:
    r"""Compute mean and mean square of the per-sample gradients, exactly, in one pass.

    With :math:`L_j` the mean loss of the j-th ``group_size`` consecutive samples
    (groups run on across batches, the last may be smaller and counts like others) and
    :math:`G_j` its gradient, returns :math:`m = \frac1J \sum_j G_j` and
    :math:`F = \frac1J \sum_j G_j \odot G_j`. The result does not depend on the batch
    size, and no per-sample gradient of a weight is ever stored. The sums take 8 bytes a
    weight, and 16 more once there are more than 512 groups: blocks of so many are added
    up in float64, so a million samples lose no more digits than 512.

    With ``labels="sampled"``, :math:`G_j` in F is the gradient for labels that are
    drawn from the model instead of the given ones, the mean over ``draws``: F is then
    the diagonal of the Fisher information, not of the empirical one. Labels are drawn
    by softmax of each position, by the logistic function, or as the output plus noise
    of variance 1 (squared errors). m stays the mean gradient of the loss of the given
    labels, which is the term of first order in a Taylor expansion; for drawn ones its
    expectation is zero. F is of the loss as it is: for cross-entropy of one position,
    with groups of 1, its expectation is ``gauss_newton_diagonal``; of a mean over T
    positions it is 1 / T of that, of a mean of K squared errors 2 / K.

    It costs a forward and a backward pass, and ``draws`` backward passes more for
    sampled labels. These take 8 more bytes a weight, or 8 for each draw where groups
    are larger than 1.

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
        labels: "given", or "sampled" for a loss that says how labels are distributed:
            cross-entropy, squared error or binary cross-entropy, of PyTorch or of
            ``fisherprune.losses``.
        draws: of labels, for each sample; groups are those of each draw.
        seed: of drawn labels. Those of a sample depend on its number among all samples,
            not on batches.
        parameters: by name, ``prunable_parameters(model)`` by default; any that the
            losses depend on, frozen ones too. ``paths`` of the result says in which way
            the gradients of each were found.
        progress: whether to show a bar over the batches, with tqdm, on stderr.
        process_group: of ``torch.distributed``, whose ranks all make this call, each
            with batches of its own, maybe none (``DistributedSampler`` repeats samples
            to give all as many): ``torch.distributed.group.WORLD`` for all ranks. Sums
            are added up at the end of a pass, so each rank returns the same bits, the
            moments of all samples up to rounding. Each rank's batches form groups of
            their own, of which its last may be smaller: that is what one process finds
            where the samples of each rank are a multiple of ``group_size``. Ranks draw
            different labels. Model and options must be the same on all ranks. Where
            one rank fails, all raise its error.

    Passes of several threads run one after the other, whatever their models: a pass
    holds what is the process's. Ctrl-C takes effect at the next batch.

    Where squares of gradients leave float32's range (gradients below 1e-19, or above
    1e19), the pass runs once or twice more with its losses times a power of two, which
    changes no digit; an iterator that can be read only once can't be. ``sum``,
    ``sum_sq`` and ``exponent`` then hold what ``prune`` and ``score`` read; a
    ``FisherpruneWarning`` names the parameters whose F is zero as float32.

    Returns:
        The moments. They are zero for a parameter on which no loss depends.

    Raises:
        FisherpruneError: where the data is empty or labels are out of range, a loss,
            gradient or F as float32 is not finite, samples mix (seen in the last sample
            of the first batch that has two), activations are checkpointed, or a
            parameter is hooked or not of real floating-point numbers.

    Reference:
        Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
        Gradient Descent", 2019, for F of both kinds of labels.
    """
    with together(process_group):
        if labels == "given" and draws != 1:
            raise FieldError("draws", "1 where labels are given", shown(draws))
        settings = Settings(labels=labels, draws=draws)
        options = loss_fn, group_size, progress, losses, settings, seed
        task = checked_task(model, batches, parameters, *options, process_group)
        check_alike(task)
        found = _gradient_moments(task)
        if found.exponent:
            check_finite(found.fisher, FISHER)
            remedy = "prune and score count them exactly; here, scale the loss up"
            warn_of_lost("gradient_moments", lost(found.mean, found.fisher), remedy)
    return found


def _check_labels(task: Task) -> None:
    if task.settings.labels == "sampled":
        _reader(task)


def _reader(task: Task) -> Reader:
    return reader_of("gradient_moments", task, "labels='sampled'")


@register_pass("moments", yields=("m", "F"), check=_check_labels, over_ranks=True)
def moments_pass(task: Task) -> ModelStatistics:
    """Yield the mean gradient and the Fisher diagonal."""
    return _gradient_moments(task).statistics


def _gradient_moments(task: Task) -> GradientMoments:
    op, sampled = "gradient_moments", task.settings.labels == "sampled"
    forward = of_losses(task)
    if sampled:
        forward = of_likelihoods(op, _reader(task), losses=True)

    def run(exponent: int) -> PerSampleSums:
        kind = SampledSums if sampled else PerSampleSums
        sums = kind(task, task.group_size, exponent != 0)
        with evaluating(task.model, task.parameters.values()):
            for each in tapped_passes(op, task, forward, sums):
                sums.choose(0)
                loss = scaled(each.result.sum(), exponent)
                each.backward(loss, again=sampled)
                if isinstance(sums, SampledSums):
                    sums.add_drawn(each, task, exponent)
        return sums.add_ranks(op, task)

    sums, exponent = in_range(op, FISHER, task.batches, run)
    counts = sums.samples, sums.groups, task.group_size
    found = GradientMoments(*sums.sums(), *counts, sums.paths, exponent)
    return replace(found, labels=task.settings.labels)
