"""Taps the backward pass for per-sample gradients of watched parameters.

While a ``LayerTap`` is active, a call of a supported function with a watched parameter
runs through an autograd function whose backward computes the input gradient and, in
place of the framework's weight gradient, reports a ``Contribution``. The tap sees calls
of functions, not modules: functional use and tied weights are covered, nothing in the
model is touched and no hook is left behind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import owner
from fisherprune.persample.contributions import Contribution, Gradients
from fisherprune.persample.layers.base import (
    CALLS,
    REWRITES,
    LayerCall,
    SamplesMixError,
    known_functions,
)

RECOMPUTING = (
    "activation checkpointing runs layers again untapped, and other hooks on saved "
    "tensors may: they must be switched off for scoring"
)


class UnknownGradientsError(FisherpruneError):
    """Parameters are used where the tap does not know their per-sample gradients."""

    def __init__(self, op: str, refused: Mapping[str, str]) -> None:
        """Say why the first is refused, and how to leave all of them out."""
        first, *others = refused
        also = f"; neither can {len(others)} more be scored" if others else ""
        names = ", ".join(map(repr, refused))
        super().__init__(
            f"{op}: {refused[first]}{also}: leave {'them' if others else 'it'} out, by "
            "parameters={name: p for name, p in fisherprune.prunable_parameters(model)"
            f".items() if name not in {{{names}}}}}"
        )


class LayerTap(TorchFunctionMode):
    """Reports the gradients of each parameter, ``report(name, gradients)``.

    Args:
        model: the one whose forward pass is tapped; read for messages alone.
        parameters: the watched parameters by name.
        samples: N, the leading dimension that every watched layer's input must have.
        report: called once per parameter and backward pass: during it where the
            parameter is used once, after it where several uses had to be joined.
        op: named in errors.
        keep_last: whether to keep what each call reads of the last sample.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        samples: int,
        report: Callable[[str, Gradients], None],
        op: str,
        keep_last: bool = False,
    ) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.model = model
        self.parameters = parameters
        self.samples = samples
        self.report = report
        self.op, self.keep_last = op, keep_last
        self.uses: Counter[str] = Counter()
        self.refused: dict[str, str] = {}  # why, by name
        self.hidden: str | None = None  # a parameter that was used without autograd
        self.last_inputs: list[Tensor] = []  # of the last sample, a row for each call
        self.several: dict[str, list[Contribution]] = defaultdict(list)
        self.running = False  # whether the backward pass is the one of the losses
        # An input of every tapped call, so that autograd runs through all of them.
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Tap the calls inside; the model's forward pass and its losses belong here.

        Raises:
            FisherpruneError: where activations are to be computed again later.
        """
        try:
            with disable_saved_tensors_hooks(RECOMPUTING), self:
                yield
        except RuntimeError as error:
            if RECOMPUTING not in str(error):
                raise
            raise FisherpruneError(f"{self.op}: {RECOMPUTING}") from None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run supported functions of watched parameters through the tap."""
        kwargs = kwargs or {}
        if func in REWRITES and self._watches(args, kwargs):
            with self:
                return REWRITES[func](*args, **kwargs)
        if func not in CALLS:
            return func(*args, **kwargs)
        try:
            call = CALLS[func](*args, **kwargs)
        except SamplesMixError as error:
            # One sample has none to mix with; other inputs are computed from weights.
            if self.samples > 1 and len(error.input) == self.samples:
                raise FisherpruneError(f"{self.op}: {error}") from None
            return func(*args, **kwargs)
        except FisherpruneError as error:
            raise FisherpruneError(f"{self.op}: {error}") from None
        operands = call.weight, call.bias
        names = tuple(self.names.get(id(p)) for p in operands)
        computed = tuple(
            operand if not name and _is_computed(operand) else None
            for name, operand in zip(names, operands, strict=True)
        )
        watched = [name for name in names if name]
        if watched and (reason := self._unfit(call, func, watched[0])):
            self.refused |= dict.fromkeys(watched, reason)
            return func(*args, **kwargs)
        if watched:
            self._note(call, watched[0])
            self.uses.update(watched)
            return _TappedLayer.apply(
                call.input, self.anchor, *computed, call, names, self
            )
        # Where nothing is watched, the gradients of all parameters are autograd's.
        unread = self.names and not call.reads_input
        if unread and all(operand is None for operand in computed):
            return _UnwatchedLayer.apply(call.input, call)
        return func(*args, **kwargs)

    def _watches(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Return whether a watched parameter is an argument, or in a list of them."""
        arguments = (*args, *kwargs.values())
        lists = (a for a in arguments if isinstance(a, list | tuple))
        return any(id(a) in self.names for a in chain(arguments, *lists))

    def _unfit(self, call: LayerCall, func: Callable[..., Any], name: str) -> str:
        """Return why the call's per-sample gradients are not known, or nothing."""
        shape, wanted = tuple(call.input.shape), call.weight_dims
        if wanted and call.weight is not None and call.weight.dim() != wanted:
            return (
                f"the weight {name!r} of a {func.__name__} call must have {wanted} "
                f"dimensions, got {call.weight.dim()}"
            )
        fits = len(shape) == call.dims if call.dims else len(shape) >= 2
        if fits and shape[0] == self.samples:
            return ""
        return (
            f"the input of the layer of {name!r} must have the batch's {self.samples} "
            f"samples as its first dimension, got shape {list(shape)}"
        )

    def _note(self, call: LayerCall, name: str) -> None:
        if not torch.is_grad_enabled():
            self.hidden = name
        if self.keep_last:
            self.last_inputs.append(call.input[-1].detach().clone())

    def collect(self, name: str, contribution: Contribution) -> None:
        """Hand one use's contribution to ``report``, or keep it to join the uses."""
        if self.uses[name] == 1:
            self.report(name, contribution)
        else:
            self.several[name].append(contribution)

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Run the backward pass of ``loss``; nothing receives a ``.grad``.

        Args:
            loss: a scalar.
            again: whether another backward pass through the same calls follows.

        Raises:
            UnknownGradientsError: where watched parameters are reached by another way
                than the tapped layers, or an input of one has not the samples first.
        """
        if self.hidden and _has_own_functions(loss):
            raise FisherpruneError(f"{self.op}: {RECOMPUTING}; {self.hidden!r} is used")
        inputs = [self.anchor, *self.parameters.values()]
        self.running = True
        try:
            outside = torch.autograd.grad(
                loss, inputs, allow_unused=True, retain_graph=again
            )
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise FisherpruneError(f"{self.op}: {RECOMPUTING}") from None
        finally:
            self.running = False
        for name, grad in zip(self.parameters, outside[1:], strict=True):
            if grad is not None:
                self.refused.setdefault(name, self._outside(name))
        if self.refused:
            raise UnknownGradientsError(self.op, self.refused)
        while self.several:
            name, (first, *others) = self.several.popitem()
            self.report(name, first.join(others))

    def _outside(self, name: str) -> str:
        where = owner(self.model, self.parameters[name])
        return (
            f"{name!r}, of {where}, is used outside of {known_functions()} calls (in a "
            "fused or another kind of layer, or to compute a weight), where its "
            "per-sample gradients are not known"
        )


def _has_own_functions(loss: Tensor) -> bool:
    """Return whether autograd passes functions written in Python that are not ours.

    Such functions may run layers in their forward pass without autograd, and again,
    untapped, in their backward pass: reentrant checkpointing, reversible blocks.
    """
    ours = (_TappedLayer._backward_cls, _UnwatchedLayer._backward_cls)
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction) and not isinstance(node, ours):
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False


def _is_computed(operand: Tensor | None) -> bool:
    """Return whether autograd has to go on from it to what it comes from."""
    return operand is not None and not operand.is_leaf


def _values(call: LayerCall) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias cut off from autograd."""
    weight, bias = (p if p is None else p.detach() for p in (call.weight, call.bias))
    return weight, bias


class _UnwatchedLayer(torch.autograd.Function):
    """A layer that nobody watches and whose gradient does not read its input.

    Then the input is not kept: of BatchNorm layers, that is half of what the backward
    pass of many networks keeps.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: LayerCall) -> Tensor:
        ctx.layer = call.layer
        weight, bias = _values(call)
        ctx.save_for_backward(weight)
        return call.layer.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_grad(grad, None, *ctx.saved_tensors), None


class _TappedLayer(torch.autograd.Function):
    """A layer whose watched parameters' gradients go to the tap, not to autograd.

    A ``weight`` or ``bias`` that is computed gets its ordinary gradient: so autograd
    finds the watched parameters that it is computed from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        computed_weight: Tensor | None,
        computed_bias: Tensor | None,
        call: LayerCall,
        names: tuple[str | None, str | None],
        tap: LayerTap,
    ) -> Tensor:
        weight, bias = _values(call)
        output = call.layer.forward(input, weight, bias)
        if output._is_view():  # of a tensor nobody has; autograd forbids to change it
            output = torch.ops.aten._unsafe_view(output, output.shape)
        # Not the call itself: its input would live until the whole backward pass ends.
        ctx.layer, ctx.names, ctx.tap = call.layer, names, tap
        # Under autocast the layer ran in the output's dtype: so must its backward.
        ctx.save_for_backward(
            input.to(output.dtype), None if weight is None else weight.to(output.dtype)
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_name, bias_name = ctx.names
        if not ctx.tap.running:
            raise FisherpruneError(
                f"{ctx.tap.op}: the model or the loss takes gradients through the "
                f"layer of {weight_name or bias_name!r} by itself, which are no "
                "gradients of the samples' losses: leave it out of parameters"
            )
        input, weight = ctx.saved_tensors
        layer, shape = ctx.layer, None if weight is None else tuple(weight.shape)
        input_grad = weight_grad = bias_grad = None
        if weight_name:
            ctx.tap.collect(weight_name, layer.weight_grads(grad, input, shape))
        elif ctx.needs_input_grad[2]:
            weight_grad = layer.weight_grads(grad, input, shape).total().view(shape)
        if bias_name:
            ctx.tap.collect(bias_name, layer.bias_grads(grad))
        elif ctx.needs_input_grad[3]:
            bias_grad = layer.bias_grads(grad).total()
        if ctx.needs_input_grad[0]:
            input_grad = layer.input_grad(grad, input, weight)
        return input_grad, None, weight_grad, bias_grad, None, None, None
