"""The mean gradient alone, by plain autograd: of any parameter, in any layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fisherprune.statistics.moments  # noqa: F401  registers the pass of that name
from fisherprune.parameters import check_finite
from fisherprune.statistics.batches import grads_of
from fisherprune.statistics.forward import Forward, of_losses
from fisherprune.statistics.parts import in_order, in_parts
from fisherprune.statistics.passes import ModelStatistics, Task, register_pass
from fisherprune.statistics.plain import plain_passes
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.ranks import add_up_, counted, gathered
from fisherprune.statistics.scale import scaled
from fisherprune.statistics.store import final_store, first_store

OP = "mean_gradient"
BYTES = 2 * 8
"""That the sums take for each weight."""
GRADIENT = "the mean gradient"
"""What errors call m."""


@dataclass(frozen=True)
class MeanGradient:
    """A mean gradient, of losses times a power of two.

    Attributes:
        mean: float32, by parameter name.
        samples: number of samples of this rank's batches.
        all_samples: number of samples of all ranks.
        groups: number of groups of all ranks.
        spread: the root of the mean square of the norms of the batches' own mean
            gradients: what is left of it in ``mean``, rounding errors grow with.
    """

    mean: dict[str, Tensor]
    samples: int
    all_samples: int
    groups: int
    spread: float


@register_pass(
    "gradient", yields=("m",), within="moments", over_ranks=True, offloads=True
)
def gradient_pass(task: Task) -> ModelStatistics:
    """Yield the mean gradient, as "moments" does, without the squares.

    That samples mix is seen in the outputs and losses alone, not in layers' inputs.
    """

    def run(task: Task) -> MeanGradient:
        return mean_gradient(OP, task, of_losses(task))

    parts = in_parts(OP, task, BYTES, run)
    mean = in_order(task, [each.mean for each in parts])
    check_finite(mean, GRADIENT)
    return ModelStatistics({"m": mean}, parts[0].all_samples, task.group_size)


def mean_gradient(
    op: str, task: Task, forward: Forward, exponent: int = 0
) -> MeanGradient:
    """Compute the mean over groups of their gradients, times ``2**exponent``."""
    named = task.parameters if task.part is None else task.part.of(task.parameters)
    weights, store = [*named.values()], first_store(task.settings)
    seen, size, square = 0, task.group_size, torch.zeros((), dtype=torch.float64)
    with evaluating(task.model, task.parameters.values()):
        every, last = (
            [store.zeros(w, torch.float64) for w in weights] for _ in range(2)
        )
        for n, losses in plain_passes(op, task, forward):
            seen += n
            closed = max(0, n - seen % size)  # samples of groups that end in the batch
            if closed:
                loss = scaled(losses[:closed].sum(), exponent)
                some = _add(op, [every], loss, weights, again=closed < n)
                square = square + some / closed
                for tensor in last:
                    tensor.zero_()
            if closed < n:
                loss = scaled(losses[closed:].sum(), exponent)
                some = _add(op, [every, last], loss, weights, again=False)
                square = square + some / (n - closed)
        # A sample has the weight 1 / size in its group, but for a smaller last group.
        more = 1 / (seen % size) - 1 / size if seen % size else 0.0
        for all, rest in zip(every, last, strict=True):
            all.div_(size).add_(rest, alpha=more)
    counts = gathered(task, op, (seen, -(-seen // size), float(square)))
    samples, groups, total = counted(op, counts)
    add_up_(task, every)
    store, totals = final_store(task.settings), zip(named, every, strict=True)
    mean = {name: store.keep((sum / groups).float()) for name, sum in totals}
    spread = math.sqrt(total / samples)
    return MeanGradient(mean, seen, int(samples), int(groups), spread)


def _add(
    op: str,
    sums: list[list[Tensor]],
    loss: Tensor,
    weights: Sequence[Tensor],
    again: bool,
) -> Tensor:
    """Add the gradient of the loss to each of the sums; return its squared norm."""
    grads = grads_of(op, loss, weights, retain_graph=again)
    for sum in sums:
        for total, grad in zip(sum, grads, strict=True):
            total.add_(grad.to(total.device))
    return _norm(grads).square()


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Return the norm over all entries, with one wait for the device."""
    return float(_norm(tensors))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.stack([n.to(norms[0].device) for n in norms]).norm()
