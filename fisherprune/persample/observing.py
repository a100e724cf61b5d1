"""A tap beside the gradients of autograd, which each parameter still receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherprune.errors import FisherpruneError
from fisherprune.persample.arguments import Arguments, with_tensors
from fisherprune.persample.backward import Passing, TappedCall
from fisherprune.persample.calls import Key
from fisherprune.persample.contributions import (
    Contribution,
    Gradients,
    LayerContribution,
)
from fisherprune.persample.functions import Function
from fisherprune.persample.layout import Layout, LayoutError
from fisherprune.persample.meeting import Front, autocast_of
from fisherprune.persample.registry import Layer, LayerCall
from fisherprune.persample.tap import LayerTap


@dataclass
class _Met:
    """A layer that met samples.

    Attributes:
        layer: what it computes.
        positions: as in ``LayerCall``.
        weight: the first parameter.
        places: of weight and bias among the call's tensors; None where not shared.
        output: where the samples are, in the input and in the output.
        tap: that sums the weight's gradient up in place of autograd; or None.
        total: what it found.
    """

    layer: Layer
    positions: bool
    weight: Tensor | None
    places: tuple[int | None, int | None]
    output: Layout
    tap: ObservingTap | None = None
    total: Tensor | None = None

    def summed(self, own: LayerContribution, merged: Contribution) -> Gradients:
        """Return the weight's gradients such that ``total`` will be their sum."""
        assert self.weight is not None and self.tap is not None
        if id(self.weight) not in self.tap.single:  # squared with others, later
            self.total = own.total().view_as(self.weight)
            return merged
        self.total = torch.zeros_like(self.weight)
        return _Summed(merged, self.total)


def _rule(met: Any, grad: Tensor, tensors: Sequence[Tensor]) -> dict[int, Any]:
    """Return the gradients of a layer's weight and bias, by their places."""
    front, found = Front(met.positions), dict[int, Any]()
    weight, bias = met.places
    own_grad = front.moved(grad, met.output)
    if weight is not None:
        # Under autocast the layer ran in the output's dtype.
        input = front.moved(tensors[0].to(grad.dtype), met.output)
        own = met.layer.weight_grads(own_grad, input, tuple(met.weight.shape))
        found[weight] = merged = front.merged(own)
        if met.tap:
            found[weight] = met.summed(own, merged)
    if bias is not None:
        found[bias] = front.merged(met.layer.bias_grads(own_grad))
    return found


class _Summed:
    """Gradients of a weight, whose sum over the samples is kept when they are squared.

    Args:
        gradients: of the samples.
        total: to which the sum is added.
    """

    def __init__(self, gradients: Contribution, total: Tensor) -> None:
        self.gradients, self.total = gradients, total

    def samples(self, chosen: slice) -> _Summed:
        """Return those of some of the samples."""
        return _Summed(self.gradients.samples(chosen), self.total)

    def add_moments(self, sum: Tensor, sum_sq: Tensor, group_size: int) -> None:
        """Accumulate over groups of one sample."""
        own = torch.zeros_like(sum)
        self.gradients.add_moments(own, sum_sq, group_size)
        sum += own
        self.total += own.view_as(self.total)


class _FusedCall(TappedCall):
    """Returns the weight's gradient, too: autograd does not compute it once more."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Tell the tap; return the gradients of the output and of the weight."""
        return *TappedCall.backward(ctx, grad)[:-1], ctx.meeting.total


class ObservingTap(LayerTap):
    """Reports gradients of single samples, while each ``.grad`` is filled as ever.

    Calls run as they are written, on ``Passing``s of what is shared.

    Attributes:
        fuses: names of the parameters, used once, whose gradients the tap sums up.
        spent: whether a backward pass has passed its calls.
    """

    replaces = False
    fuses: frozenset[str] = frozenset()
    spent = False

    def cut(self, shared: Tensor) -> Tensor:
        """Return what autograd follows back to the shared tensor."""
        return Passing.apply(shared, self)

    def check_running(self, shared: int) -> None:
        """Refuse a backward pass whose begin was not seen."""
        if not self.running:
            raise FisherpruneError(
                f"{self.op}: a backward pass through the model must be loss.backward() "
                "inside of the context; torch.autograd.grad, and a pass after its end, "
                "need a forward pass outside of it"
            )

    def _layer(
        self,
        func: Function,
        call: LayerCall,
        layout: Layout,
        arguments: Arguments,
        tensors: list[Tensor],
    ) -> Tensor:
        own = {i: id(t) for i, t in enumerate(tensors) if id(t) in self.keys}
        weight, bias = (
            next((i for i in own if tensors[i] is each), None)
            for each in (call.weight, call.bias)
        )
        met = _Met(call.layer, call.positions, call.weight, (weight, bias), layout)
        cut = [self.cut(t) if i in own else t for i, t in enumerate(tensors)]
        function: type[TappedCall] = TappedCall
        read = [call.input.detach()]
        if weight is not None and self._fuses(call):
            function, met.tap = _FusedCall, self
            read.append(cut[weight])
            cut[weight] = tensors[weight].detach()
        args, kwargs = with_tensors(arguments, iter(cut))
        output = func(*args, **kwargs)
        if not layout.fits(output):
            raise LayoutError("its result has not the samples where its input has")
        for i in own:
            self._note(tensors[i], func.__name__)
        return function.apply(output, self.anchor, met, _rule, own, self, *read)

    def _fuses(self, call: LayerCall) -> bool:
        """Return whether the kernels find a weight's gradient as well as autograd."""
        weight = call.weight
        return (
            weight is not None
            and weight.dim() > 1
            and weight.dtype == call.input.dtype == torch.float32
            and autocast_of() is None
            and any(self.parameters[n] is weight for n in self.roots[id(weight)])
            and self.roots[id(weight)] <= self.fuses
        )

    def _met(
        self,
        func: Function,
        arguments: Arguments,
        tensors: list[Tensor],
        key: Key,
        is_layer: bool = False,
    ) -> Tensor:
        if _flags(arguments) != _flags(self.known[key].arguments):
            raise LayoutError("it is called otherwise in train mode than in eval mode")
        return super()._met(func, arguments, tensors, key, is_layer)


def _flags(value: object) -> list[object]:
    """Return the arguments that can't depend on the number of samples."""
    if isinstance(value, list | tuple):
        return [flag for each in value for flag in _flags(each)]
    if isinstance(value, dict):
        return [flag for key in sorted(value) for flag in _flags(value[key])]
    return [value] if isinstance(value, bool | float) else []


class BackwardMode(TorchFunctionMode):
    """Hands each ``loss.backward()`` to a function.

    Args:
        run: of the loss, the backward pass as a function, and its options.
    """

    def __init__(
        self, run: Callable[[Tensor, Callable[..., None], dict[str, Any]], None]
    ) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function."""
        if func is Tensor.backward:
            return self.run(args[0], func, kwargs or {})
        return func(*args, **(kwargs or {}))
