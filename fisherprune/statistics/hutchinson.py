"""The diagonal of the Hessian, estimated by Hutchinson's method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisherprune.parameters import Parameters, check_finite
from fisherprune.shards import shards_of
from fisherprune.statistics.accumulators import Sums
from fisherprune.statistics.alike import agreed
from fisherprune.statistics.batches import Batches, grads_of
from fisherprune.statistics.blocks import BlockSum
from fisherprune.statistics.estimates import Estimate, estimate_of
from fisherprune.statistics.forward import of_losses
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.passes import (
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.plain import plain_passes
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.ranks import add_up_, counted, gathered, together
from fisherprune.statistics.scale import ENOUGH, LEAP, scaled
from fisherprune.statistics.settings import Settings, checked_number
from fisherprune.statistics.twice import in_plain_functions, twice_differentiable
from fisherprune.statistics.whole import in_whole
from fisherprune.streams import stream

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP, DIAGONAL = "hutchinson_diagonal", "Hutchinson's estimate of the Hessian's diagonal"
"""What errors call it."""


def hutchinson_diagonal(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    probes: int = 10,
    seed: int = 0,
    losses: Losses | None = None,
    parameters: Parameters | None = None,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
) -> Estimate:
    r"""Estimate the diagonal of the Hessian of the mean loss.

    .. math:: \frac1K \sum_{k=1}^K z_k \odot (H z_k)

    with H the Hessian of the mean loss over all samples with respect to ``parameters``,
    in eval mode, and z vectors of random signs. Its expectation is H's diagonal; the
    variance of element i is :math:`\frac1K \sum_{j \ne i} H_{ij}^2`. Elements may be
    negative, by noise or because the loss is not convex. Of a ReLU network,
    ``gauss_newton_diagonal`` is the same diagonal without noise.

    It costs a forward and a backward pass, and K passes through both of these (a second
    derivative each), by PyTorch's autograd. The signs take K bytes a weight, their
    products 4 K, 12 K for more than 512 batches times probes; criteria that read D take
    one sum for all probes.

    The published code of "What Scalable Second-Order Information Knows for Pruning at
    Initialization" divides the outputs by 200 before the loss, which a ``loss_fn`` can,
    and draws other signs for each batch; here all batches have the same, so their size
    changes nothing.

    Args:
        model: any module that has a second derivative; runs in eval mode.
        batches: as in ``gradient_moments``; one at a time.
        loss_fn: as in ``gradient_moments``; any.
        probes: K, at least 2.
        seed: of the signs.
        losses: as in ``gradient_moments``; any.
        parameters: as in ``gradient_moments``.
        progress: whether to show a bar over the batches, with tqdm, on stderr.
        process_group: as in ``gradient_moments``.

    Returns:
        The estimate and its standard error over the probes, by parameter name.

    Raises:
        FisherpruneError: where the estimate is not finite, or for any reason of
            ``gradient_moments``; that samples mix is seen in outputs and losses alone.

    Reference:
        Bekas et al., "An Estimator for the Diagonal of a Matrix", 2007; Yao et al.,
        "ADAHESSIAN", 2021.

    Example:
        >>> import torch, fisherprune
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        >>> named = dict(model.named_parameters())
        >>> found = fisherprune.hutchinson_diagonal(model, batches, parameters=named)
        >>> found.mean["weight"].shape, found.draws
        (torch.Size([2, 3]), 10)
    """
    with together(process_group):
        settings = Settings(probes=checked_number("probes", probes, 2))
        options = loss_fn, 1, progress, losses, settings, seed, process_group
        task = agreed(checked_task(model, batches, parameters, *options))
        found = in_whole(task, _estimate)
        mean, error = (
            shards_of(named, task.parameters)
            for named in (found.mean, found.standard_error)
        )
        return replace(found, mean=mean, standard_error=error)


@torch.inference_mode(False)
def _estimate(task: Task) -> Estimate:
    each, samples, exponent = _in_range(task, several=task.settings.probes)
    return estimate_of(each, DIAGONAL, 2.0**-exponent / samples)


@register_pass("hutchinson", yields=("D",), over_ranks=True)
def hutchinson_pass(task: Task) -> ModelStatistics:
    """Yield the estimate; the group size plays no part in it."""
    (found,), samples, exponent = _in_range(task)
    for diagonal in found.values():
        diagonal.div_(samples * task.settings.probes)
    check_finite(found, DIAGONAL)
    result = ModelStatistics({"D": found}, samples, task.group_size)
    return result.scaled(D=exponent)


def _in_range(task: Task, several: int = 1) -> tuple[list[Sums], int, int]:
    """Run the pass, and again with its losses scaled where float32 loses digits.

    Returns:
        The sums, the samples, and the exponent of the losses' factor.
    """
    found, samples = _summed(task, several, 0)
    top = max(float(t.abs().max()) for t in found[0].values() if t.numel())
    if not 0 < top < ENOUGH or isinstance(task.batches, Iterator):
        return found, samples, 0
    exponent = min(-math.frexp(top)[1], LEAP)
    return *_summed(task, several, exponent), exponent


def _summed(task: Task, several: int, exponent: int) -> tuple[list[Sums], int]:
    """Add up products of probes, to several sums in turn; return the samples, too."""
    weights, samples = [*task.parameters.values()], 0
    # Attention's fused kernels have no second derivative.
    with evaluating(task.model, task.parameters.values()), in_plain_functions():
        probes = _probes(task)
        found = [
            [torch.zeros_like(w, dtype=torch.float32) for w in weights]
            for _ in range(several)
        ]
        blocks = BlockSum([each for totals in found for each in totals])
        for n, losses in plain_passes(OP, task, of_losses(task)):
            products = _products(scaled(losses.sum(), exponent), weights, probes)
            for k, (signs, along) in enumerate(zip(probes, products, strict=True)):
                blocks.make_room(1)
                for total, z, product in zip(
                    found[k % several], signs, along, strict=True
                ):
                    total += z * product
            samples += n
        blocks.finish()
    (samples,) = map(int, counted(OP, gathered(task, OP, (samples,))))
    add_up_(task, [each for totals in found for each in totals])
    names = [*task.parameters]
    return [dict(zip(names, totals, strict=True)) for totals in found], samples


def _probes(task: Task) -> list[list[Tensor]]:
    """Return random signs, int8, of each probe and parameter."""

    def signs(name: str, like: Tensor, k: int) -> Tensor:
        numbers = stream(task.seed, f"hutchinson {k} {name}")
        drawn = torch.randint(
            2, like.shape, generator=numbers, dtype=torch.int8, device="cpu"
        )  # alike on every device
        return drawn.mul_(2).sub_(1).to(like.device)

    count = range(task.settings.probes)
    return [[signs(n, p, k) for n, p in task.parameters.items()] for k in count]


def _products(
    loss: Tensor, weights: Sequence[Tensor], probes: list[list[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """Yield the product of the Hessian with each probe."""
    grads = twice_differentiable(OP, loss, weights)
    for k, signs in enumerate(probes):
        along = torch.stack(
            [(g * z).sum().float() for g, z in zip(grads, signs, strict=True)]
        ).sum()
        if not along.requires_grad:  # a loss that is linear in the weights
            yield [torch.zeros_like(w) for w in weights]
            continue
        yield grads_of(OP, along, weights, retain_graph=k < len(probes) - 1)
