"""Autograd functions by which a tap sees the gradients of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from fisherprune.persample.contributions import Contribution
from fisherprune.persample.layout import Layout
from fisherprune.persample.meeting import Front, Meeting, Rule, multiplied_out
from fisherprune.persample.registry import LayerCall
from fisherprune.shards import is_shard

if TYPE_CHECKING:
    from fisherprune.persample.tap import LayerTap


def has_taps(tensor: Tensor) -> bool:
    """Return whether a tensor comes from tapped calls."""
    return any(_is_ours(node) for node in nodes_of(tensor))


@dataclass
class Passed:
    """What a backward pass passes.

    Attributes:
        has_own_functions: whether there are functions in Python that are not ours. Such
            may run layers in their forward pass without autograd, and again, untapped,
            in their backward pass: reentrant checkpointing, reversible blocks.
        leaves: ids of the leaves that gradients reach.
        kept: the parameters of calls under another tap, in an earlier batch: a model
            keeps what it computed from them.
    """

    has_own_functions: bool = False
    leaves: set[int] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)


def passed(loss: Tensor, tap: LayerTap) -> Passed:
    """Return what the backward pass of a loss would pass."""
    found = Passed()
    for node in nodes_of(loss, tap):
        if isinstance(node, BackwardCFunction):
            other = getattr(node, "tap", tap) if _is_ours(node) else None
            found.has_own_functions |= other is None
            if other is not None and other is not tap:
                names = other.names_of(_shared_by(node))
                own = tap.parameters
                found.kept |= {n for n in names if other.parameters[n] is own.get(n)}
        elif hasattr(node, "variable"):
            found.leaves.add(id(node.variable))
    return found


def taps_of(loss: Tensor) -> set[Any]:
    """Return the taps whose calls the backward pass of a loss would pass."""
    ours = (node for node in nodes_of(loss) if _is_ours(node))
    return {node.tap for node in ours if hasattr(node, "tap")}


def _shared_by(call: Any) -> list[int]:
    """Return the ids of a call's shared tensors."""
    shared = call.shared
    ids = shared.values() if isinstance(shared, dict) else shared
    return [each for each in ids if each]


def _is_ours(node: Node) -> bool:
    """Return whether it is of this package, whose functions run no layer again."""
    function = getattr(node, "_forward_cls", None)
    return getattr(function, "__module__", "").startswith("fisherprune.")


def nodes_of(tensor: Tensor, tap: LayerTap | None = None) -> Iterator[Node]:
    """Yield the nodes of the graph that leads to a tensor.

    Not those behind a ``Passing`` of ``tap``.
    """
    todo, seen = [tensor.grad_fn], set[Node]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if tap is None or getattr(node, "reader", None) is not tap:
            todo += [following for following, _ in node.next_functions]


def _values(call: LayerCall) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias cut off from autograd.

    Of a parameter itself autocast would keep what it casts here, without a graph, and
    read that in later calls, whose gradients are autograd's.
    """
    weight, bias = (p if p is None else p.detach() for p in (call.weight, call.bias))
    return weight, bias


def _owned(output: Tensor) -> Tensor:
    """Return the output as one that may be changed in place."""
    return torch.ops.aten._unsafe_view(output, output.shape)


def _differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse second derivatives; nothing is asked where none can be taken."""
    careful = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor) -> Any:
        return (careful if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


class UnwatchedLayer(torch.autograd.Function):
    """A layer that nobody watches and whose gradient does not read its input.

    Then the input is not kept: of BatchNorm layers, that is half of what the backward
    pass of many networks keeps.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: LayerCall) -> Tensor:
        """Run the layer."""
        ctx.layer = call.layer
        weight, bias = _values(call)
        ctx.save_for_backward(weight)
        return call.layer.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the input's gradient."""
        return ctx.layer.input_grad(grad, None, *ctx.saved_tensors), None


class TappedLayer(torch.autograd.Function):
    """A layer whose shared weight or bias goes to the tap, not to autograd.

    A ``weight`` or ``bias`` that is computed from samples or from what nobody watches
    gets its ordinary gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        computed_weight: Tensor | None,
        computed_bias: Tensor | None,
        call: LayerCall,
        shared: tuple[int | None, int | None],
        layout: Layout,
        tap: LayerTap,
    ) -> Tensor:
        """Run the layer."""
        weight, bias = _values(call)
        output = call.layer.forward(input, weight, bias)
        if output._is_view():  # of a tensor nobody has; autograd forbids to change it
            output = _owned(output)
        # Not the call itself: its input would live until the whole backward pass ends.
        ctx.layer, ctx.shared, ctx.tap = call.layer, shared, tap
        ctx.layout, ctx.positions = layout, call.positions
        # Under autocast the layer ran in the output's dtype: so must its backward.
        dtype = output.dtype
        ctx.save_for_backward(
            input if input.dtype == dtype else input.to(dtype),
            weight if weight is None or weight.dtype == dtype else weight.to(dtype),
        )
        return output

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Tell the tap what is shared; return the other gradients."""
        of_weight, of_bias = ctx.shared
        ctx.tap.check_running(of_weight or of_bias)
        input, weight = ctx.saved_tensors
        layer, shape = ctx.layer, None if weight is None else tuple(weight.shape)
        input_grad = weight_grad = bias_grad = None
        checks = ctx.tap.check is not None
        if checks and ctx.tap.is_checking(ctx, ctx.layout, grad, _shared_by(ctx)):
            of_weight = of_bias = None
        elif together := _all_grads(ctx, grad, input, weight):
            input_grad, *own = together
            for id_, each in zip(ctx.shared, own, strict=True):
                if id_:
                    ctx.tap.collect(id_, each)
            return input_grad, *(None for _ in range(7))
        if of_weight or of_bias:
            front = Front(ctx.positions)
            own_grad = front.moved(grad, ctx.layout)
        if of_weight:
            own_input = front.moved(input, ctx.layout)
            own = layer.weight_grads(own_grad, own_input, shape)
            ctx.tap.collect(of_weight, front.merged(own))
        elif ctx.needs_input_grad[2]:
            weight_grad = layer.weight_grads(grad, input, shape).total().view(shape)
        if of_bias:
            ctx.tap.collect(of_bias, front.merged(layer.bias_grads(own_grad)))
        elif ctx.needs_input_grad[3]:
            bias_grad = layer.bias_grads(grad).total()
        if ctx.needs_input_grad[0]:
            input_grad = layer.input_grad(grad, input, weight)
        return input_grad, None, weight_grad, bias_grad, None, None, None, None


def _all_grads(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None
) -> tuple[Tensor, Contribution, Contribution] | None:
    """Return the gradients of input, weight and bias, where a layer finds all at once.

    That is where samples are the rows, and autograd wants neither weight's nor bias's.
    """
    find = getattr(ctx.layer, "all_grads", None)
    plain = ctx.layout.axis == 0 and len(input) == ctx.layout.samples
    if find is None or not plain or any(ctx.needs_input_grad[2:4]):
        return None
    return find(grad, input, weight)


class TappedCall(torch.autograd.Function):
    """Passes the output of a call on, and tells the tap its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        meeting: Meeting,
        rule: Rule,
        shared: dict[int, int],
        tap: LayerTap,
        *tensors: Tensor,
    ) -> Tensor:
        """Return the output, in a tensor of its own."""
        ctx.meeting, ctx.rule, ctx.shared, ctx.tap = meeting, rule, shared, tap
        ctx.others = 5 + len(tensors)
        ctx.save_for_backward(*tensors)
        whole = output if output._base is None else output._base
        kind: Any = type(whole.grad_fn)
        lent = rule is multiplied_out or is_shard(output) or _saves_result(kind)
        lent = lent or output._is_view() and _shares_memory(output, tensors)
        return output.clone() if lent else _owned(output)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Tell the tap; return the gradient as it came."""
        ctx.tap.check_running(next(iter(ctx.shared.values())))
        shared = _shared_by(ctx)
        place = getattr(ctx.meeting, "rows", None) or ctx.meeting.output
        checking = ctx.tap.is_checking(ctx, place, grad, shared)
        if not checking and any(ctx.tap.wants(each) for each in shared):
            found = ctx.rule(ctx.meeting, grad, ctx.saved_tensors)
            for i, contribution in found.items():
                if i in ctx.shared:
                    ctx.tap.collect(ctx.shared[i], contribution)
        return grad, *(None for _ in range(ctx.others))


def _shares_memory(output: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether a result lies in one of the tensors that it is made of."""
    place = output.untyped_storage().data_ptr()
    return any(place == each.untyped_storage().data_ptr() for each in tensors)


@cache
def _saves_result(kind: Any) -> bool:
    """Return whether a function's backward pass may read its result, as that of tanh.

    Then who changes the result in place must change a copy.
    """
    return any(n in ("_saved_result", "_saved_output") for n in dir(kind))


class Passing(torch.autograd.Function):
    """Passes a shared tensor on to a tapped call, and its gradient back to autograd."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, tap: LayerTap) -> Tensor:
        """Return the tensor."""
        ctx.reader = tap
        return shared.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it came."""
        return grad, None
