"""Taps the backward pass for per-sample gradients of watched parameters.

While a ``LayerTap`` is active, a call of a supported function with a watched parameter
runs through an autograd function whose backward computes the input gradient and, in
place of the framework's weight gradient, reports a ``Contribution``. The tap sees calls
of functions, not modules: functional use and tied weights are covered, nothing in the
model is touched and no hook is left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from fisherprune.contributions import Contribution
from fisherprune.errors import FisherpruneError
from fisherprune.layers import CALLS, Call

SUPPORTED = "conv1d, conv2d, linear and batch_norm"


class LayerTap(TorchFunctionMode):
    """Reports what each parameter's use contributes, ``report(name, contribution)``.

    Args:
        parameters: the watched parameters by name.
        samples: N, the leading dimension that every watched layer's input must have.
        report: called once per parameter: during the backward pass where the parameter
            is used once, after it where several uses had to be joined.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        samples: int,
        report: Callable[[str, Contribution], None],
    ):
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.parameters = parameters
        self.samples = samples
        self.report = report
        self.uses = Counter()
        self.joined: dict[str, Contribution] = {}
        # An input of every tapped call, so that autograd runs through all of them.
        self.anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run supported functions of watched parameters through the tap."""
        kwargs = kwargs or {}
        if func not in CALLS:
            return func(*args, **kwargs)
        call = CALLS[func](*args, **kwargs)
        weight, bias = self._name(call.weight), self._name(call.bias)
        if weight is None and bias is None:
            return func(*args, **kwargs)
        self._check_input(call, weight or bias)
        self.uses.update(name for name in (weight, bias) if name)
        return _TappedLayer.apply(
            call.input, self.anchor, call, (weight, bias), self._collect
        )

    def _name(self, parameter: Tensor | None) -> str | None:
        return self.names.get(id(parameter))

    def _check_input(self, call: Call, name: str) -> None:
        shape = tuple(call.input.shape)
        fits = len(shape) == call.dims if call.dims else len(shape) >= 2
        if not fits or shape[0] != self.samples:
            raise FisherpruneError(
                f"gradient_moments: the input of the layer of {name!r} must have the "
                f"batch's {self.samples} samples as its first dimension, got shape "
                f"{list(shape)}"
            )

    def _collect(self, name: str, contribution: Contribution) -> None:
        if self.uses[name] == 1:
            self.report(name, contribution)
        elif name in self.joined:
            self.joined[name] = self.joined[name] + contribution
        else:
            self.joined[name] = contribution

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of ``loss``; nothing receives a ``.grad``.

        Raises:
            FisherpruneError: where a watched parameter is reached by another way than
                the tapped layers.
        """
        watched = list(self.parameters.values())
        inputs = [self.anchor, *watched]
        try:
            outside = torch.autograd.grad(loss, inputs, allow_unused=True)
        except CheckpointError:
            raise FisherpruneError(
                "gradient_moments: activation checkpointing runs layers again untapped;"
                " switch it off for scoring"
            ) from None
        for name, grad in zip(self.parameters, outside[1:], strict=True):
            if grad is not None:
                raise FisherpruneError(
                    f"gradient_moments: {name!r} is used outside of {SUPPORTED}; its "
                    "per-sample gradients are not known: leave it out of parameters"
                )
        for name, contribution in self.joined.items():
            self.report(name, contribution)


class _TappedLayer(torch.autograd.Function):
    """A layer whose parameters' gradients go to ``collect`` and not to autograd."""

    @staticmethod
    def forward(ctx, input, anchor, call, names, collect):
        weight = None if call.weight is None else call.weight.detach()
        output = call.layer.forward(
            input, weight, None if call.bias is None else call.bias.detach()
        )
        # Not the call itself: its input would live until the whole backward pass ends.
        ctx.layer, ctx.names, ctx.collect = call.layer, names, collect
        # Under autocast the layer ran in the output's dtype: so must its backward.
        ctx.save_for_backward(
            input.to(output.dtype), None if weight is None else weight.to(output.dtype)
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        layer, (weight_name, bias_name) = ctx.layer, ctx.names
        if weight_name:
            shape = tuple(weight.shape)
            ctx.collect(weight_name, layer.weight_grads(grad, input, shape))
        if bias_name:
            ctx.collect(bias_name, layer.bias_grads(grad))
        input_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = layer.input_grad(grad, input, weight)
        return input_grad, None, None, None, None
