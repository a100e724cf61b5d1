"""The check that samples don't mix where the model's code is in the backward pass.

Hooks, functions with a backward pass of their own, and what is detached change
gradients while values stay: a gradient that is divided by the batch size, say, or an
equilibrium whose hook runs backward passes through the tapped calls.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.persample.contributions import Gradients
from fisherprune.persample.rows import LargeReachCheck
from fisherprune.persample.tap import LayerTap, OwnGradientsError, scores_of
from fisherprune.statistics.apart import tolerance_of
from fisherprune.statistics.batches import Batch, running
from fisherprune.statistics.forward import Forward
from fisherprune.statistics.passes import Task

TOLERANCE = 0.25
"""By which squares may differ: where a ReLU rounds to its other side, they do."""
LEAST = 1e-30
"""Squares of which float32 may hold none."""

OTHERWISE = (
    "a hook, a detach or an autograd.Function gives it other gradients in a batch than "
    "of a sample alone"
)

Sizes = dict[str, float]
"""Sums of squares of gradients, by parameter name."""


def few_of(task: Task, batch: Batch) -> Batch | None:
    """Return a copy of a batch's last samples, at most three.

    The loss of the middle one may reach either neighbour. None of a model whose
    parameters ranks have in parts, which is not compared.
    """
    in_parts = task.tensor_group is not None or task.leaves
    return None if in_parts else batch.last(3)


def check_backward(
    op: str, task: Task, forward: Forward, few: Batch, tap: LayerTap
) -> dict[str, str]:
    """Compare what a tap sees of a few samples with the gradients of each by itself.

    Args:
        op: named in errors.
        task: with the model.
        forward: the pass.
        few: of ``few_of``, as no run has changed them.
        tap: of the batch that they are of.

    Returns:
        why the tap does not see a parameter's gradients, by its name; nothing where the
        backward pass fails, as that of the whole batch will.

    Raises:
        FisherpruneError: where the gradients of a sample are others beside one copy of
            it than beside two.
    """
    last = few.size - 1
    copies = [(last, 3), (last, 2), *((i, 2) for i in range(last))]
    try:
        seen, mixed = _seen(op, task, forward, few.last(few.size), tap)
        wide, own, *others = (
            _of_sample(op, task, forward, few.alone(*each), tap) for each in copies
        )
    except (FisherpruneError, OwnGradientsError):
        raise
    except Exception:
        return {}
    rounding = max(map(_rounding, [*task.used.values(), *few.tensors]))
    for name in _differing(wide, own, rounding):
        raise FisherpruneError(
            f"{op}: samples mix in the backward pass: the gradients of {name!r} depend "
            "on how many samples a batch has, by a hook, a detach, an "
            "autograd.Function or a state that the model keeps from one call to the "
            "next: change that, or leave the parameter out"
        )
    every = {name: size + sum(o[name] for o in others) for name, size in own.items()}
    # Of rows of any samples, the tap has seen whose they are.
    names = mixed.union(_differing(seen, every, rounding)) - tap.scattered
    return dict.fromkeys(names, OTHERWISE)


def _seen(
    op: str, task: Task, forward: Forward, few: Batch, tap: LayerTap
) -> tuple[Sizes, set[str]]:
    """Return what a tap sees of samples, and the names of what reaches other ones."""
    found = Sizes()

    def add(name: str, gradients: Gradients) -> None:
        sum = torch.zeros_like(tap.parameters[name], dtype=torch.float32)
        squares = torch.zeros_like(sum)
        gradients.add_moments(sum, squares, 1)
        found[name] = found.get(name, 0.0) + squares.sum(dtype=torch.float64).item()

    given = tap.parameters, few.tensors, few.size, add, op
    other = LayerTap(*given, known=dict(tap.known))
    with running(op, few), other.forward():
        ran = forward(task.model, few)
    other.prepare(ran.result)
    before = set(other.refused)
    other.check_samples(ran.result, LargeReachCheck)
    other.backward(scores_of(ran.result).sum())
    return found, other.refused.keys() - before


def _of_sample(
    op: str, task: Task, forward: Forward, copies: Batch, tap: LayerTap
) -> Sizes:
    """Return what autograd finds of a sample beside copies of it."""
    with running(op, copies):
        ran = forward(task.model, copies).of_first()
    weights = [*tap.parameters.values()]
    grads = torch.autograd.grad(
        scores_of(ran.result).sum(), weights, materialize_grads=True
    )
    sizes = [grad.double().square().sum().item() for grad in grads]
    return dict(zip(tap.parameters, sizes, strict=True))


def _rounding(tensor: Tensor) -> float:
    """Return what squares of gradients that are zero have beside the largest."""
    exact = not tensor.is_floating_point() or (found := tolerance_of(tensor)) <= 1e-3
    return 1e-10 if exact else found**2


def _differing(found: Sizes, wanted: Mapping[str, float], rounding: float) -> Sizes:
    """Return what was found otherwise than wanted, by more than rounding."""
    least = max(LEAST, rounding * max(wanted.values()))
    return {
        name: size
        for name, size in found.items()
        if abs(size - wanted[name]) > TOLERANCE * wanted[name] + least
    }
