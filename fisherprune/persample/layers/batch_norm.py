"""BatchNorm with running statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune import ops
from fisherprune.persample.contributions import Rows, summed_positions
from fisherprune.persample.registry import LayerCall, SamplesMixError, register_layer


@dataclass(frozen=True, eq=False)
class _BatchNorm:
    """batch_norm with running statistics: an affine map of each channel."""

    mean: Tensor
    var: Tensor
    eps: float
    _factors: dict[torch.dtype | None, Tensor] = field(default_factory=dict)

    def forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """``[N, C, *] -> [N, C, *]``."""
        options = False, 0.0, self.eps, torch.backends.cudnn.enabled
        return torch.batch_norm(input, weight, bias, self.mean, self.var, *options)

    @cached_property
    def _scale(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    def input_grad(
        self, grad: Tensor, input: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        return grad * _of_channels(self._factor(weight), grad)

    def _factor(self, weight: Tensor | None) -> Tensor:
        """Return what a channel's gradient is multiplied by: it is kept."""
        dtype = None if weight is None else weight.dtype  # that of autocast, maybe
        if dtype not in self._factors:
            with torch.no_grad():
                scale = self._scale
                self._factors[dtype] = scale if weight is None else scale * weight
        return self._factors[dtype]

    def weight_grads(self, grad: Tensor, input: Tensor, shape: tuple[int, ...]) -> Rows:
        centered = input - _of_channels(self.mean, input)
        return Rows(summed_positions(centered.mul_(grad)).rows * self._scale)

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad)

    def all_grads(
        self, grad: Tensor, input: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Rows, Rows] | None:
        """Return all gradients by one op, on the CPU in float32."""
        read = grad, input, self.mean, self.var
        if not all(_is_float32(t) for t in read) or not _is_dense(input):
            return None
        given = grad, input, self.mean.contiguous(), self._scale, self._factor(weight)
        found = ops.channel_affine_backward(*given)
        input_grad, *own = found
        return input_grad, Rows(own[0]), Rows(own[1])


def _is_float32(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32


def _is_dense(input: Tensor) -> bool:
    return input.is_contiguous() or input.movedim(1, -1).is_contiguous()


def _of_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view((-1,) + (1,) * (like.dim() - 2))


@register_layer(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> LayerCall:
    """Sort the arguments of ``F.batch_norm`` out."""
    if training or running_mean is None or running_var is None:
        raise SamplesMixError(
            "a BatchNorm layer uses batch statistics, which mix the samples; it must "
            "run in eval mode with running statistics",
            input,
        )
    read = [t for t in (running_mean, running_var, weight) if t is not None]
    lasting = all(t.is_leaf for t in read)  # not computed in each batch
    return LayerCall(
        _BatchNorm(running_mean, running_var, eps),
        input,
        weight,
        bias,
        positions=False,
        reads_input=False,
        constants=(*read, eps) if lasting else (),
    )
