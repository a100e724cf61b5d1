"""The prunable parameters, and the layer functions whose per-sample gradients we know.

A layer object describes one call of a function: how to run it, its input gradient, and
what it contributes to the per-sample gradients of its weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.contributions import Factors, summed_positions
from fisherprune.errors import FisherpruneError, shown


def prunable_parameters(
    model: nn.Module, skip: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the parameters to prune, by name, in ``named_parameters()`` order.

    Args:
        model: any module.
        skip: by default the weights of Conv and Linear modules are chosen except the
            classifier's (the last Linear). With name parts to skip, all parameters
            whose names contain none of them: ``skip=("bias", "linear", "bn")`` is the
            choice of the published FTS code, which also prunes the BatchNorm weights
            inside of ``shortcut``.

    Raises:
        FisherpruneError: where nothing is left to prune; by default also where a weight
            is computed from other parameters (``weight_norm``, ``spectral_norm``,
            ``torch.nn.utils.prune``): which of those to prune only you can say.
    """
    named = dict(checked_model(model).named_parameters())
    if skip is None:
        chosen = {id(w) for w in _layer_weights(model)}
        found = {name: p for name, p in named.items() if id(p) in chosen}
    else:
        parts = _checked_parts(skip)
        found = {n: p for n, p in named.items() if not any(part in n for part in parts)}
    if not found:
        raise FisherpruneError(
            f"prunable_parameters: {type(model).__name__} has no prunable parameters "
            f"among its {len(named)} (skip={skip!r})"
        )
    return found


def checked_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is a module.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(model, nn.Module):
        raise FisherpruneError(
            f"model must be a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _checked_parts(skip: Sequence[str]) -> tuple[str, ...]:
    parts = (skip,) if isinstance(skip, str) else skip
    parts = tuple(parts) if isinstance(parts, Iterable) else (parts,)
    if not all(isinstance(part, str) for part in parts):
        raise FisherpruneError(
            "prunable_parameters: skip must be parts of parameters' names, got "
            f"{shown(skip)}"
        )
    return parts


def _layer_weights(model: nn.Module) -> list[nn.Parameter]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    linear = [m for _, m in layers if isinstance(m, nn.Linear)]
    classifier = linear[-1] if linear else None
    return [_own_weight(name, m) for name, m in layers if m is not classifier]


def _own_weight(name: str, layer: nn.Module) -> nn.Parameter:
    # Not ``layer.weight``: reading a computed one computes it and may change buffers.
    weight = layer._parameters.get("weight")
    if weight is None:
        raise FisherpruneError(
            f"prunable_parameters: the weight of {name!r} must be a parameter of that "
            f"{type(layer).__name__}, got one computed from others: choose yourself, "
            "by skip=(...) or parameters={name: parameter, ...}"
        )
    return weight


def owner(model: nn.Module, parameter: nn.Parameter) -> str:
    """Say whose parameter it is: ``Linear in MultiheadAttention``."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if any(p is parameter for p in module._parameters.values()):
            kind, around = type(module).__name__, modules[name.rpartition(".")[0]]
            return f"{kind} in {type(around).__name__}" if name else kind
    return type(model).__name__


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


CPU_BYTES = 2 << 20
"""Of a layer's input, for each thread, that its backward pass takes at a time."""


def _samples_at_once(input: Tensor) -> int:
    """Return how many samples a convolution's backward pass should take at a time.

    On the CPU it copies images into an order of its own and back: copies of a whole
    batch leave the cache, and are pages that the system hands out anew in every layer.
    """
    if input.device.type != "cpu" or input.numel() == 0:
        return len(input)
    bytes_at_once = CPU_BYTES * torch.get_num_threads()
    return max(1, bytes_at_once // (input[0].numel() * input.element_size()))


@dataclass(frozen=True)
class Conv2dLayer:
    """conv2d, zero-padded alike on both sides."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, input, weight, bias):
        """``[N, C, H, W] -> [N, O, P, Q]``."""
        return F.conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )

    def input_grad(self, grad, input, weight):
        """Return the gradient of the input alone."""
        at_once = _samples_at_once(input)
        if at_once >= len(input):
            return self._input_grad(grad, input, weight)
        result = torch.empty_like(input)
        parts = (t.split(at_once) for t in (result, grad, input))
        for part, *operands in zip(*parts, strict=True):
            part.copy_(self._input_grad(*operands, weight))
        return result

    def _input_grad(self, grad, input, weight):
        size = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        return torch.ops.aten.convolution_backward(
            grad, input, weight, None, *size, (True, False, False)
        )[0]

    def weight_grads(self, grad, input, shape):
        """Return the weight's contribution."""
        return Factors(input, grad, shape, vars(self))

    def bias_grads(self, grad):
        """Return the bias's contribution."""
        return summed_positions(grad)


@dataclass(frozen=True)
class Conv1dLayer:
    """conv1d, as the conv2d over an image one pixel high."""

    conv2d: Conv2dLayer

    def forward(self, input, weight, bias):
        """``[N, C, L] -> [N, O, M]``."""
        image = self.conv2d.forward(input.unsqueeze(2), weight.unsqueeze(2), bias)
        return image.squeeze(2)

    def input_grad(self, grad, input, weight):
        """Return the gradient of the input alone."""
        images = (t.unsqueeze(2) for t in (grad, input, weight))
        return self.conv2d.input_grad(*images).squeeze(2)

    def weight_grads(self, grad, input, shape):
        """Return the weight's contribution."""
        shape = (*shape[:2], 1, *shape[2:])
        return self.conv2d.weight_grads(grad.unsqueeze(2), input.unsqueeze(2), shape)

    def bias_grads(self, grad):
        """Return the bias's contribution."""
        return summed_positions(grad)


@dataclass(frozen=True)
class LinearLayer:
    """Linear, with any positions between the samples and the features."""

    def forward(self, input, weight, bias):
        """``[N, *, in] -> [N, *, out]``."""
        return F.linear(input, weight, bias)

    def input_grad(self, grad, input, weight):
        """Return the gradient of the input."""
        return grad @ weight

    def weight_grads(self, grad, input, shape):
        """Return the weight's contribution."""
        return Factors(input, grad, shape)

    def bias_grads(self, grad):
        """Return the bias's contribution."""
        return summed_positions(grad.movedim(-1, 1))


@dataclass(frozen=True)
class BatchNormLayer:
    """batch_norm with running statistics: an affine map of each channel."""

    mean: Tensor
    var: Tensor
    eps: float

    def forward(self, input, weight, bias):
        """``[N, C, *] -> [N, C, *]``."""
        return F.batch_norm(
            input, self.mean, self.var, weight, bias, False, 0.0, self.eps
        )

    def _scale(self, dims, weight=None):
        scale = (self.var + self.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        return scale.view((-1,) + (1,) * (dims - 2))

    def input_grad(self, grad, input, weight):
        """Return the gradient of the input."""
        return grad * self._scale(grad.dim(), weight)

    def weight_grads(self, grad, input, shape):
        """Return the weight's contribution."""
        centered = input - self.mean.view((-1,) + (1,) * (input.dim() - 2))
        return summed_positions(grad * centered * self._scale(grad.dim()))

    def bias_grads(self, grad):
        """Return the bias's contribution."""
        return summed_positions(grad)


@dataclass(frozen=True)
class Call:
    """A call of a supported function, with its arguments sorted out."""

    layer: Conv1dLayer | Conv2dLayer | LinearLayer | BatchNormLayer
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dims: int | None  # the input's dimensions, samples first; None = at least two


def _same_padding(input, weight, padding, dilation):
    """Turn "same" and "valid" into numbers; an uneven "same" pads the input itself."""
    if padding == "valid":
        return input, (0, 0)
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if not any(total % 2 for total in totals):
        return input, tuple(total // 2 for total in totals)
    sides = [(total // 2, total - total // 2) for total in reversed(totals)]
    return F.pad(input, [side for pair in sides for side in pair]), (0, 0)


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    dilation = _pair(dilation)
    if isinstance(padding, str):
        input, padding = _same_padding(input, weight, padding, dilation)
    layer = Conv2dLayer(_pair(stride), _pair(padding), dilation, groups)
    return Call(layer, input, weight, bias, dims=4)


def _conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    dilation = _pair(dilation)[:1]
    if isinstance(padding, str):
        input, padding = _same_padding(input, weight, padding, dilation)
    stride, padding = (1, _pair(stride)[0]), (0, _pair(padding)[0])
    image = Conv2dLayer(stride, padding, (1, *dilation), groups)
    return Call(Conv1dLayer(image), input, weight, bias, dims=3)


def _linear(input, weight, bias=None):
    return Call(LinearLayer(), input, weight, bias, dims=None)


def _batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    if training or running_mean is None or running_var is None:
        raise FisherpruneError(
            "a BatchNorm layer uses batch statistics, which mix the samples; it must "
            "run in eval mode with running statistics"
        )
    layer = BatchNormLayer(running_mean, running_var, eps)
    return Call(layer, input, weight, bias, dims=None)


CALLS = {
    F.conv1d: _conv1d,
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
}
"""From a function to the one that sorts its arguments out, same signature."""
