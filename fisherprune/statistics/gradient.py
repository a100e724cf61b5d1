"""The mean gradient alone, by plain autograd: of any parameter, in any layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fisherprune.statistics.moments  # noqa: F401  registers the pass of that name
from fisherprune.parameters import check_finite
from fisherprune.statistics.driver import plain_passes
from fisherprune.statistics.forward import of_losses
from fisherprune.statistics.passes import ModelStatistics, Task, register_pass
from fisherprune.statistics.protect import evaluating


@register_pass("gradient", yields=("m",), within="moments")
def gradient_pass(task: Task) -> ModelStatistics:
    """Yield the mean gradient, as "moments" does, without the squares.

    That samples mix is seen in the outputs and losses alone, not in layers' inputs.
    """
    op, weights = "mean_gradient", [*task.parameters.values()]
    every, last = ([w.detach().double().zero_() for w in weights] for _ in range(2))
    seen, size = 0, task.group_size
    with evaluating(task.model, task.parameters.values()):
        for n, losses in plain_passes(op, task, of_losses(task)):
            seen += n
            closed = max(0, n - seen % size)  # samples of groups that end in the batch
            if closed:
                some = losses[:closed].sum()
                _add([every], some, weights, again=closed < n)
                for tensor in last:
                    tensor.zero_()
            if closed < n:
                _add([every, last], losses[closed:].sum(), weights, again=False)
    groups = -(-seen // size)
    # Each sample has the weight 1 / size in its group, but for a smaller last group.
    more = 1 / (seen % size) - 1 / size if seen % size else 0.0
    mean = {
        name: (all.div_(size).add_(rest, alpha=more) / groups).float()
        for name, all, rest in zip(task.parameters, every, last, strict=True)
    }
    check_finite(mean, "the mean gradient")
    return ModelStatistics({"m": mean}, seen, size)


def _add(
    sums: list[list[Tensor]], loss: Tensor, weights: Sequence[Tensor], again: bool
) -> None:
    """Add the gradient of the loss to each of the sums."""
    grads = torch.autograd.grad(
        loss, weights, retain_graph=again, materialize_grads=True
    )
    for sum in sums:
        for total, grad in zip(sum, grads, strict=True):
            total.add_(grad)
