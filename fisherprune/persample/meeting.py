"""A call where shared tensors meet samples, of any function.

The function runs as it is, on shared tensors without a gradient. What its gradient is
for each sample, a rule says, or the function itself, differentiated for one sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.persample.arguments import Arguments, with_tensors
from fisherprune.persample.contributions import (
    Contribution,
    LayerContribution,
    Streamed,
)
from fisherprune.persample.functions import Function
from fisherprune.persample.layout import Layout, Scattered
from fisherprune.persample.registry import CALLS, LayerCall


@dataclass(frozen=True)
class Meeting:
    """What is known of the call.

    Attributes:
        func: the function.
        arguments: as for one sample alone, with an empty tensor in the place of each.
        layouts: of its tensors, in order; None for what is none of the samples.
        shared: which of them are shared.
        output: the layout of the output.
        autocast: the dtype of autocast by device, where it was on.
        rows: of the output, where they are of any samples; then it has no ``output``.
    """

    func: Function
    arguments: Arguments
    layouts: tuple[Layout | None, ...]
    shared: tuple[int, ...]
    output: Layout
    autocast: tuple[str, torch.dtype] | None = None
    rows: Scattered | None = None

    @property
    def samples(self) -> int:
        """Return N."""
        return self.output.samples

    def sample_of_rows(self, like: Tensor) -> Tensor:
        """Return whose each element of a tensor is, flat.

        Args:
            like: a tensor with the axis of the output's samples; where the output has
                ``rows``, one element for each.
        """
        return self.rows.told() if self.rows else self.output.sample_of_rows(like)

    def call(self, tensors: Sequence[Tensor]) -> Tensor:
        """Run the function on one sample's tensors."""
        args, kwargs = with_tensors(self.arguments, iter(tensors))
        if self.autocast is None:
            return self.func(*args, **kwargs)
        device, dtype = self.autocast
        with torch.autocast(device, dtype):
            return self.func(*args, **kwargs)


def autocast_of() -> tuple[str, torch.dtype] | None:
    """Return the device and dtype of autocast, where it is on."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None


Rule = Callable[[Meeting, Tensor, Sequence[Tensor]], Mapping[int, Contribution]]
"""From the output's gradient and the call's tensors to contributions by tensor."""

RULES: dict[Function, Rule] = {}
"""Of functions with a cheaper way than being differentiated for each sample."""


def register_rule(*functions: Function) -> Callable[[Rule], Rule]:
    """Use the decorated rule for calls of these functions."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


OwnRule = Callable[..., Mapping[str, LayerContribution] | None]


def register_gradients(
    *functions: Function, positions: bool = True
) -> Callable[[OwnRule], OwnRule]:
    """Teach statistics passes the gradients of a function's parameters.

    Decorates a function of the output's gradient and of the arguments of a call, the
    samples first. It returns, by the names of arguments, what they contribute: ``Rows``
    of per-sample gradients, or ``Factors``::

        @fisherprune.register_gradients(scaled)  # input [N, *, F], weight [F]
        def scaled_gradients(grad, input, weight):
            return {"weight": fisherprune.Rows((grad * input).flatten(1, -2).sum(1))}

    The function runs as it is: the gradient of its input is autograd's. Without a rule,
    a function is differentiated for each sample by ``torch.func``, so a rule is only a
    matter of speed.

    Args:
        functions: of torch, or those that call
            ``torch.overrides.handle_torch_function``.
        positions: whether the rule takes any number of dimensions between the samples
            and the features. Else tensors have the dimensions that they had in the
            call, and what is several rows of a sample comes as several samples.

    A rule may return None for a call that it does not cover.

    Raises:
        FisherpruneError: where a function is registered already.
    """
    for function in functions:
        if function in RULES or function in CALLS:
            raise FisherpruneError(
                "register_gradients: function must be one that is not registered yet, "
                f"got {function.__name__}"
            )

    def register(own: OwnRule) -> OwnRule:
        names = inspect.signature(own)

        @register_rule(*functions)
        def rule(
            meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
        ) -> Mapping[int, Contribution]:
            axes = [each.axis for each in (*meeting.layouts, meeting.output) if each]
            if not positions and any(axes):
                return multiplied_out(meeting, grad, tensors)
            front = Front(positions)
            moved = [
                front.moved(tensor, layout) if layout else tensor
                for layout, tensor in zip(meeting.layouts, tensors, strict=True)
            ]
            args, kwargs = with_tensors(meeting.arguments, iter(moved))
            bound = names.bind(front.moved(grad, meeting.output), *args, **kwargs)
            found = own(*bound.args, **bound.kwargs)
            if found is None:
                return multiplied_out(meeting, grad, tensors)
            places = {id(tensor): i for i, tensor in enumerate(moved)}
            return {
                places[id(bound.arguments[name])]: front.merged(contribution)
                for name, contribution in found.items()
                if isinstance(bound.arguments.get(name), Tensor)
            }

        return own

    return register


class Front:
    """Brings the samples to the front of tensors.

    Args:
        positions: whether k rows of a sample may become a dimension behind it; else
            they become k samples, whose contributions are merged.
    """

    def __init__(self, positions: bool) -> None:
        self.positions, self.k = positions, 1

    def moved(self, tensor: Tensor, layout: Layout) -> Tensor:
        """Return the tensor with the samples first."""
        leading = layout.leading(tensor)
        if self.positions or leading.dim() == tensor.dim():
            return leading
        self.k = leading.shape[1]
        return leading.flatten(0, 1)

    def merged(self, contribution: LayerContribution) -> Contribution:
        """Return the contribution of whole samples."""
        return contribution if self.k == 1 else contribution.merged(self.k)


def sorted_out(meeting: Meeting, tensors: Sequence[Tensor]) -> LayerCall:
    """Return what kind of layer a call is of, which has such a kind."""
    args, kwargs = with_tensors(meeting.arguments, iter(tensors))
    call = CALLS[meeting.func](*args, **kwargs)
    assert call is not None
    return call


def layer_rule(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """Return the gradients of weight and bias by the rule for a kind of layer."""
    call = sorted_out(meeting, tensors)
    front, found = Front(call.positions), dict[int, Contribution]()
    own_grad = front.moved(grad, meeting.output)
    for i in meeting.shared:
        if tensors[i] is call.weight:
            # Under autocast the layer ran in the output's dtype.
            input = front.moved(call.input.to(grad.dtype), meeting.output)
            shape = tuple(call.weight.shape)
            own = call.layer.weight_grads(own_grad, input, shape)
            found[i] = front.merged(own)
        elif tensors[i] is call.bias:
            found[i] = front.merged(call.layer.bias_grads(own_grad))
    return found


def multiplied_out(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """Differentiate the function for each sample, some samples at a time."""
    grads = meeting.output.apart(grad)
    apart = [
        layout.apart(tensor) if layout else tensor
        for layout, tensor in zip(meeting.layouts, tensors, strict=True)
    ]
    return {
        i: Streamed(_rows_of(meeting, i, grads, apart), 0, len(grads))
        for i in meeting.shared
    }


def _rows_of(
    meeting: Meeting, index: int, grads: Tensor, apart: list[Tensor]
) -> Callable[[slice], Tensor]:
    moving = [i for i, layout in enumerate(meeting.layouts) if layout]

    def pulled(shared: Tensor, grad: Tensor, *own: Tensor) -> Tensor:
        def output(of: Tensor) -> Tensor:
            tensors = list(apart)
            for i, tensor in zip(moving, own, strict=True):
                tensors[i] = tensor
            tensors[index] = of
            return meeting.call(tensors)

        return torch.func.vjp(output, shared)[1](grad)[0]

    def rows(some: slice) -> Tensor:
        columns = [grads[some], *(apart[i][some] for i in moving)]
        shared = apart[index].detach()
        try:
            dims = (None, *(0 for _ in columns))
            return torch.func.vmap(pulled, dims, randomness="error")(shared, *columns)
        except (RuntimeError, NotImplementedError):  # what vmap can't run
            each: Iterator[Any] = zip(*columns, strict=True)
            return torch.stack([pulled(shared, *columns) for columns in each])

    return rows
