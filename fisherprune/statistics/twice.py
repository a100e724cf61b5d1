"""Gradients that are differentiated once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fisherprune.errors import FisherpruneError
from fisherprune.persample.backward import nodes_of
from fisherprune.persample.functions import Function
from fisherprune.statistics.batches import grads_of

Grads = tuple[Tensor | None, ...]

ONCE = (
    "{}: {} must give gradients that can be differentiated once more: write it with "
    "torch's functions of {} (no detach, no once_differentiable, no grad without "
    "create_graph), or choose a criterion without second derivatives"
)


@contextmanager
def in_plain_functions() -> Iterator[None]:
    """Run plain functions in place of those that can be differentiated once alone."""
    with sdpa_kernel(SDPBackend.MATH), _Plain():
        yield


class _Plain(TorchFunctionMode):
    """Runs functions of which torch has no second derivatives, or wrong ones."""

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    found = F.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # Torch differentiates its backward pass as if the norms were constants.
    return v * (g / torch.norm_except_dim(v, 2, dim))


PLAIN: dict[Function, Function] = {
    F.hardsigmoid: _hardsigmoid,
    torch._weight_norm: _weight_norm,
}


def twice_differentiable(
    op: str, loss: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return gradients with a graph.

    What comes of an ``autograd.Function`` that can be differentiated once alone has no
    graph, or one that autograd passes by without a word; so has what hooks detach.

    Raises:
        FisherpruneError: where there is such a function or hook, or as ``grads_of``
            does.
    """
    grown = set[tuple[object, int]]()
    with ExitStack() as hooks:
        for node in nodes_of(loss):
            hooks.callback(node.register_hook(_check(op, node, grown)).remove)
        return grads_of(op, loss, weights, create_graph=True)


def _check(
    op: str, node: Node, grown: set[tuple[object, int]]
) -> Callable[[Grads, Grads], None]:
    """Return a hook, of a node; ``grown`` are the places to which graphs lead."""

    def check(found: Grads, given: Grads) -> None:
        for i, grad in enumerate(given):
            if grad is not None and (node, i) in grown and _is_cut(grad):
                hook = "a hook on a tensor (register_hook)"
                raise FisherpruneError(ONCE.format(op, hook, "its gradient"))
        if isinstance(node, BackwardCFunction):
            has_graph = any(grad is not None and grad.requires_grad for grad in given)
            if has_graph and any(grad is not None and _is_cut(grad) for grad in found):
                function = f"the autograd.Function {_name(node)}"
                raise FisherpruneError(ONCE.format(op, function, "what it has saved"))
        for grad, place in zip(found, node.next_functions, strict=False):
            if grad is not None and grad.requires_grad:
                grown.add(place)

    return check


def _name(node: Node) -> str:
    return node.name().removesuffix("Backward")


def _is_cut(grad: Tensor) -> bool:
    """Return whether a gradient that is not zero has no graph of its own."""
    has_graph = grad.requires_grad and type(grad.grad_fn).__name__ != "Error"
    return not has_graph and bool(grad.any())
