"""The kinds of layers: what each must say about itself, and how it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.persample.contributions import LayerContribution

Operand = Any
"""A Tensor, or None where the call has none: which of them, each layer knows."""


class Layer(Protocol):
    """What a layer computes, and its gradients. Samples come first, N of them."""

    def forward(self, input: Tensor, weight: Operand, bias: Operand) -> Tensor:
        """Return the layer's output, ``[N, ...]``; it runs without autograd."""

    def input_grad(self, grad: Tensor, input: Operand, weight: Operand) -> Tensor:
        """Return the gradient of the input, from ``grad``, that of the output.

        ``input`` may be None where the call said ``reads_input=False``.
        """

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> LayerContribution:
        """Return the per-sample gradients of the weight, which has this shape."""

    def bias_grads(self, grad: Tensor) -> LayerContribution:
        """Return the per-sample gradients of the bias."""

    # A layer may have ``all_grads(grad, input, weight)`` too, which returns the
    # gradients of input, weight and bias at once, or None where it can't.


@dataclass(slots=True)
class LayerCall:
    """A call of a layer function, with its arguments sorted out.

    Attributes:
        layer: what the call computes, with all that is neither tensor below.
        input: ``[N, ...]``.
        weight: the first parameter.
        bias: the second one.
        dims: dimensions that the input must have; None: at least two.
        positions: whether there may be any number of dimensions between the samples and
            the features. Else what is several rows of a sample comes as several samples
            to the layer, whose contributions are merged.
        weight_dims: dimensions that a weight must have; None: any.
        reads_input: whether ``layer.input_grad`` reads the input. Where it does not,
            no input is kept for a call whose parameters nobody watches.
        is_read: whether the values of the output are read; else its gradient alone
            counts.
        constants: tensors and numbers from which the layer computes what it keeps. The
            next batches use it again, as long as they are the same and unchanged.
    """

    layer: Layer
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dims: int | None = None
    positions: bool = True
    weight_dims: int | None = None
    reads_input: bool = True
    is_read: bool = True
    constants: tuple[Tensor | float, ...] = ()


class SamplesMixError(FisherpruneError):
    """A call mixes the rows of its input: samples must not pass through it.

    Args:
        message: names the kind of layer.
        input: of the call.
    """

    def __init__(self, message: str, input: Tensor) -> None:
        super().__init__(message)
        self.input = input


SortOut = TypeVar("SortOut", bound=Callable[..., LayerCall | None])

CALLS: dict[Callable[..., Any], Callable[..., LayerCall | None]] = {}
"""From a layer function to the one that sorts its arguments out."""


def register_layer(function: Callable[..., Any]) -> Callable[[SortOut], SortOut]:
    """Teach statistics passes the per-sample gradients of a layer function.

    Decorates a function with the signature of ``function`` that sorts out a call's
    arguments. Every call is seen, whatever module or functional code makes it::

        @fisherprune.register_layer(torch.nn.functional.linear)
        def linear(input, weight, bias=None):
            return LayerCall(LinearLayer(), input, weight, bias)

    where ``LinearLayer`` has the methods of ``Layer``, and its ``weight_grads`` and
    ``bias_grads`` return ``Factors`` or ``Rows``; see ``fisherprune.persample``.

    Args:
        function: of torch, or one that calls ``torch.overrides.handle_torch_function``.

    Raises:
        FisherpruneError: where the function is registered already.
    """
    if function in CALLS:
        raise FisherpruneError(
            "register_layer: function must be one that is not registered yet, got "
            f"{function.__name__}"
        )

    def register(sort_out: SortOut) -> SortOut:
        CALLS[function] = sort_out
        return sort_out

    return register


def may_be_layer(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Return whether a call is one of a kind of layer, by its arguments."""
    try:
        return function in CALLS and CALLS[function](*args, **kwargs) is not None
    except FisherpruneError:
        return True


REWRITES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""From a function to one that computes the same by functions that have rules."""


def register_rewrite(
    function: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the decorated function, in which calls are seen, in place of another.

    Args:
        function: whose arguments the decorated one takes, and whose result it returns.

    Raises:
        FisherpruneError: where the function is registered already.
    """
    if function in REWRITES:
        raise FisherpruneError(
            "register_rewrite: function must be one that is not registered yet, got "
            f"{function.__name__}"
        )

    def register(rewrite: Callable[..., Any]) -> Callable[..., Any]:
        REWRITES[function] = rewrite
        return rewrite

    return register


def inside_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return what to run, and to look into, in place of a function."""
    return REWRITES.get(function)
