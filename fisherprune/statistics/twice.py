"""Gradients that are differentiated once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor
from torch.autograd.graph import Node

from fisherprune.errors import FisherpruneError
from fisherprune.persample.backward import python_functions
from fisherprune.statistics.batches import grads_of

Grads = tuple[Tensor | None, ...]


def twice_differentiable(
    op: str, loss: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return gradients with a graph.

    What comes of an ``autograd.Function`` that can be differentiated once alone has no
    graph, or one that autograd passes by without a word.

    Raises:
        FisherpruneError: where there is such a function, or as ``grads_of`` does.
    """
    with ExitStack() as hooks:
        for node in python_functions(loss):
            hooks.callback(node.register_hook(_check(op, node)).remove)
        return grads_of(op, loss, weights, create_graph=True)


def _check(op: str, node: Node) -> Callable[[Grads, Grads], None]:
    name = node.name().removesuffix("Backward")

    def check(found: Grads, given: Grads) -> None:
        if not any(grad is not None and grad.requires_grad for grad in given):
            return
        if any(grad is not None and _is_cut(grad) for grad in found):
            raise FisherpruneError(
                f"{op}: the autograd.Function {name} must have a backward pass that "
                "can be differentiated once more: write it with torch's functions of "
                "its saved tensors (not once_differentiable, no grad without "
                "create_graph), or choose a criterion without second derivatives"
            )

    return check


def _is_cut(grad: Tensor) -> bool:
    """Return whether a gradient that is not zero has no graph of its own."""
    has_graph = grad.requires_grad and type(grad.grad_fn).__name__ != "Error"
    return not has_graph and bool(grad.any())
