"""Functions that choose, replaced by ones that let pass whatever comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fisherprune.errors import FieldError, FisherpruneError

Function = Callable[..., Any]

BOUNDS = (
    "clamp clip clamp_min clamp_max hardshrink hardswish hardtanh relu relu6 "
    "softshrink threshold"
).split()
"""Names of functions that are constant where a value is too small or too large."""
CHOICES = frozenset(
    "ceil cummax cummin floor fractional_max_pool2d fractional_max_pool3d heaviside "
    "kthvalue median mode msort nanmedian round sign sort topk trunc".split()
)
"""Names of functions of which it can't be said what the values not chosen would do."""

SMALLEST = 1e-30
"""Of what is not zero, relative to the largest, after a rectifier: in networks of any
depth nothing becomes zero or infinite."""


class Passing(TorchFunctionMode):
    """Rectifiers and bounds become the identity, the largest of values their mean.

    So each input that a function may depend on has a derivative that is not zero.
    """

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        named = kwargs or {}
        if (name in RULES or name in CHOICES) and _is_real((*args, *named.values())):
            if name in RULES:
                return RULES[name](func, *args, **named)
            raise FisherpruneError(
                f"effective_masks: paths can't be followed through {name}, which "
                "chooses among its inputs"
            )
        return func(*args, **named)


def _is_real(arguments: tuple[object, ...]) -> bool:
    """Return whether a function has to do with real numbers, not with positions."""
    return any(isinstance(t, Tensor) and t.is_floating_point() for t in arguments)


class _InRange(torch.autograd.Function):
    """The identity, but for the size of values and gradients."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return _in_range(values)

    @staticmethod
    def backward(_: Any, gradients: Tensor) -> Tensor:
        return _in_range(gradients)


def _in_range(values: Tensor) -> Tensor:
    """Return values of the same signs and of sizes in [SMALLEST, 1], but for zeros."""
    sizes = values.abs()
    largest = sizes.amax()
    scaled = sizes / torch.where(largest > 0, largest, 1)
    return values.sign() * scaled.clamp_min(SMALLEST)


def _passed(_: Function, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    return _InRange.apply(input) if input.numel() else input


def _gate(_: Function, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    return input + 0.5


def _max_pool(dims: int) -> Function:
    mean = getattr(functional, f"avg_pool{dims}d")

    def means(
        input: Tensor,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if dilation not in (1, (1,), (1,) * dims, [1], [1] * dims):
            wanted = "1 for paths to be followed through it"
            field = f"effective_masks: dilation of max_pool{dims}d"
            raise FieldError(field, wanted, dilation)
        return mean(input, kernel_size, stride, padding, ceil_mode)

    return _pool(means)


def _adaptive_max_pool(dims: int) -> Function:
    mean = getattr(functional, f"adaptive_avg_pool{dims}d")

    def means(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        return mean(input, output_size)

    return _pool(means)


def _pool(means: Function) -> Function:
    """Return what pools by means, and tells the places of maxima where it is asked."""

    def pool(func: Function, *args: Any, **kwargs: Any) -> Any:
        found, out = func(*args, **kwargs), means(*args, **kwargs)
        return out if isinstance(found, Tensor) else (out, found[1])

    return pool


def _extreme(func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the mean in place of the largest or smallest; the sum of two tensors."""
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return input + other
    found = func(input, *args, **kwargs)
    if isinstance(found, Tensor):  # of some dimensions, or of all
        return input.mean(*args, **kwargs)
    return type(found)((input.mean(*args, **kwargs), found[1]))


def _lookup(
    func: Function, input: Tensor, weight: Tensor, *args: Any, **kw: Any
) -> Any:
    """Return the rows, and something of each other row, which might have been one."""
    return func(input, weight, *args, **kw) + weight.mean(0)


RULES: dict[str, Function] = {
    **dict.fromkeys(BOUNDS, _passed),
    **dict.fromkeys(
        ("max", "min", "amax", "amin", "maximum", "minimum", "fmax", "fmin"), _extreme
    ),
    "hardsigmoid": _gate,
    "embedding": _lookup,
    **{
        f"{kind}max_pool{dims}d{ending}": make(dims)
        for kind, make in (("", _max_pool), ("adaptive_", _adaptive_max_pool))
        for dims in (1, 2, 3)
        for ending in ("", "_with_indices")
    },
}
"""By name: what takes the place of a function, which is the first argument."""
