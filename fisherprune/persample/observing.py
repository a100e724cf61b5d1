"""A tap beside the gradients of autograd, which stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherprune.errors import FisherpruneError
from fisherprune.persample.backward import Passing, TappedCall
from fisherprune.persample.calls import Arguments, Function, Key, with_tensors
from fisherprune.persample.contributions import Contribution
from fisherprune.persample.layout import Layout, LayoutError
from fisherprune.persample.meeting import Front
from fisherprune.persample.registry import Layer, LayerCall
from fisherprune.persample.tap import LayerTap


@dataclass(frozen=True)
class _Met:
    """A layer that met samples.

    Attributes:
        layer: what it computes.
        positions: as in ``LayerCall``.
        shape: of the weight; None where there is none.
        places: of weight and bias among the call's tensors.
        output: where the samples are, in the input and in the output.
    """

    layer: Layer
    positions: bool
    shape: tuple[int, ...] | None
    places: tuple[int | None, int | None]
    output: Layout


def _rule(met: _Met, grad: Tensor, tensors: Sequence[Tensor]) -> dict:
    """Return the contributions of a layer's weight and bias, by their places."""
    front, found = Front(met.positions), dict[int, Contribution]()
    weight, bias = met.places
    own_grad = front.moved(grad, met.output)
    if weight is not None and met.shape is not None:
        # Under autocast the layer ran in the output's dtype.
        input = front.moved(tensors[0].to(grad.dtype), met.output)
        own = met.layer.weight_grads(own_grad, input, met.shape)
        found[weight] = front.merged(own)
    if bias is not None:
        found[bias] = front.merged(met.layer.bias_grads(own_grad))
    return found


class ObservingTap(LayerTap):
    """Reports gradients of single samples; each ``.grad`` is what autograd finds.

    Calls run as they are written, on ``Passing``s of what is shared.

    Attributes:
        spent: whether a backward pass has passed its calls.
    """

    replaces = False
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
        cut = [self.cut(t) if i in own else t for i, t in enumerate(tensors)]
        args, kwargs = with_tensors(arguments, iter(cut))
        output = func(*args, **kwargs)
        if not layout.fits(output):
            raise LayoutError("its result has not the samples where its input has")
        for i in own:
            self._note(tensors[i], func.__name__)
        operands = call.weight, call.bias
        weight, bias = (
            next((i for i in own if tensors[i] is each), None) for each in operands
        )
        shape = None if call.weight is None else tuple(call.weight.shape)
        met = _Met(call.layer, call.positions, shape, (weight, bias), layout)
        return TappedCall.apply(
            output, self.anchor, met, _rule, own, self, call.input.detach()
        )

    def _met(
        self, func: Function, arguments: Arguments, tensors: list[Tensor], key: Key
    ) -> Tensor:
        if _flags(arguments) != _flags(self.known[key].arguments):
            raise LayoutError("it is called otherwise in train mode than in eval mode")
        return super()._met(func, arguments, tensors, key)


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
