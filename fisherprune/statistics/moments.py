"""The statistics pass of first order: gradient moments."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from fisherprune.errors import FieldError, shown
from fisherprune.parameters import Parameters, check_finite
from fisherprune.statistics.accumulators import bytes_a_weight
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batches import Batches
from fisherprune.statistics.driver import LoneSample, TappedBatch, tapped_passes
from fisherprune.statistics.forward import of_likelihoods, of_losses
from fisherprune.statistics.gradient_moments import GradientMoments
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
from fisherprune.statistics.ranks import together
from fisherprune.statistics.sampled_labels import SampledSums, sums_of_draws
from fisherprune.statistics.scale import (
    in_range,
    lost,
    scaled,
    warn_of_lost,
)
from fisherprune.statistics.settings import Settings
from fisherprune.statistics.sums import PerSampleSums, Summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "gradient_moments"
FISHER = "the mean squared gradient"
"""What errors call F."""


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
    max_accumulator_bytes: int | None = None,
    offload: str | os.PathLike[str] | None = None,
    cuda_graph: bool = False,
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

    Where there is no memory for that, sums can be kept elsewhere, and the parameters
    be shared out over several passes; the results are the same, bit for bit:

    - ``offload="cpu"`` or a folder: one pass, and the sums of a parameter are copied to
      its device and back when it is added to, 16 bytes a weight and batch. In a folder
      they are in memory-mapped files, so the system writes to the disk what does not
      fit into memory.
    - ``max_accumulator_bytes``: as many passes as are needed for the sums of each, with
      nothing copied. The sums of passes that are over stay, 8 bytes a weight.
    - both: as many passes, and the sums of each go there when it is over.

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
        parameters: by name, ``prunable_parameters(model)`` by default, whose names are
            those of a checkpoint of the model, wrapped or not; any that the losses
            depend on, frozen ones too, by the names that results shall have. ``paths``
            of the result says in which way the gradients of each were found.
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
        max_accumulator_bytes: that the sums of one pass take, 24 bytes a weight; with
            groups 28, of more than 512 samples 32; for sampled labels twice that, or
            with groups ``1 + draws`` times. What a batch adds to one parameter at a
            time is not counted.
        offload: "cpu" for the CPU's memory, or a folder, whose files have no names and
            go with the tensors; None: sums are beside the parameters. ``sum`` and
            ``sum_sq`` of the result are kept there, ``mean`` and ``fisher`` in the
            CPU's memory.

            A model whose parameters are in shards (``fully_shard``) needs the group of
            the ranks that hold them, and the moments are in the same shards: DTensors,
            8 bytes for each weight of a rank. All ranks then run all batches together,
            those of the first rank first, and groups run on from rank to rank: they
            find the bits of one process with all these batches, in its time. One
            layer, or what FSDP2 gathers as one, is whole at a time, with its moments.
            Second derivatives and synflow need the whole model on each rank, in the
            parameters' own dtype, as long as their pass runs. A rank that fails alone
            in a forward pass leaves the others waiting, as it does in training.

            Ranks of tensor parallelism (``parallelize_module``) hold a model together,
            have the same batches and are no ranks of this group, which is that of the
            other dimension of the mesh; None where there is none. Moments are DTensors
            in the parts of the parameters. A call for which there is no rule gathers
            its parameters while its gradients are found.
        cuda_graph: whether batches of the same shapes run as one CUDA graph, which a
            GPU runs without Python in between: faster where a batch is small for the
            GPU. The second batch of its shapes is recorded, and the third is run with
            the graph and without, and both compared. So the code of model and loss must
            do the same in each batch, by tensors alone: of what Python decides by other
            things than attributes of modules, nothing is seen later than in the third
            batch. Smaller batches run as ever. All do where the graph finds other sums,
            where memory for it is missing, or where the pass reads values in Python,
            changes the model, or draws from a generator, as it does for scored
            embeddings and for losses times a power of two; a ``FisherpruneWarning``
            says why. It keeps a copy of a batch and memory for its activations as long
            as the pass runs, and while sums are compared 16 bytes a weight, or up to 80
            where there are more than 512 groups. No GPU has run it yet.

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
            of the first batch that has two), activations are checkpointed, a parameter
            is hooked or not of real floating-point numbers, or for several passes
            batches can't be read again or are others each time.

    Reference:
        Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural
        Gradient Descent", 2019, for F of both kinds of labels.
    """
    with together(process_group):
        if labels == "given" and draws != 1:
            raise FieldError("draws", "1 where labels are given", shown(draws))
        settings = Settings(
            labels=labels,
            draws=draws,
            max_accumulator_bytes=max_accumulator_bytes,
            offload=offload,
            cuda_graph=cuda_graph,
        )
        options = loss_fn, group_size, progress, losses, settings, seed
        task = checked_task(model, batches, parameters, *options, process_group)
        task = agreed(task)
        found = _gradient_moments(task)
        if found.exponent:
            check_finite(found.fisher, FISHER)
            remedy = "prune and score count them exactly; here, scale the loss up"
            warn_of_lost(OP, lost(found.mean, found.fisher), remedy)
    return found


def _check_labels(task: Task) -> None:
    if task.settings.labels == "sampled":
        _reader(task)


def _reader(task: Task) -> Reader:
    return reader_of(OP, task, "labels='sampled'")


@register_pass(
    "moments",
    yields=("m", "F"),
    check=_check_labels,
    over_ranks=True,
    in_shards=True,
    offloads=True,
)
def moments_pass(task: Task) -> ModelStatistics:
    """Yield the mean gradient and the Fisher diagonal."""
    found, exponent = _summed(task)
    for named in (found.sums, found.squares):
        for tensor in named.values():
            tensor.div_(found.groups)
    parts = {"m": found.sums, "F": found.squares}
    result = ModelStatistics(parts, found.samples, task.group_size)
    return result.scaled(m=exponent, F=2 * exponent)


def _gradient_moments(task: Task) -> GradientMoments:
    found, exponent = _summed(task)
    sums = found.sums, found.squares
    counts = found.samples, found.groups, task.group_size
    moments = GradientMoments(*sums, *counts, found.paths, exponent)
    return replace(moments, labels=task.settings.labels)


def _summed(task: Task) -> tuple[Summed, int]:
    """Pass over the batches; return the sums, and the exponent of their losses."""
    several = 1 + sums_of_draws(task) if task.settings.labels == "sampled" else 1
    size = several * bytes_a_weight(task.group_size)

    def run(exponent: int) -> Summed:
        parts = in_parts(OP, task, size, partial(_pass, exponent=exponent))
        return Summed.of_parts(task, parts)

    return in_range(OP, FISHER, task.batches, run)


def _pass(task: Task, exponent: int) -> Summed:
    sampled = task.settings.labels == "sampled"
    forward = of_losses(task)
    if sampled:
        forward = of_likelihoods(OP, _reader(task), losses=True)
    kind = SampledSums if sampled else PerSampleSums
    sums = kind(task, task.group_size, exponent != 0)

    def step(each: TappedBatch | LoneSample) -> None:
        sums.choose(0)
        each.backward(scaled(each.result.sum(), exponent), again=sampled)

    with evaluating(task.model, task.parameters.values()):
        for each in tapped_passes(OP, task, forward, sums, step):
            step(each)
            if isinstance(sums, SampledSums):
                sums.add_drawn(each, task, exponent)
    return sums.add_ranks(OP, task).summed()
