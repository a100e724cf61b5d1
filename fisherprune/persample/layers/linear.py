"""Linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune import ops
from fisherprune.persample.contributions import Rows, summed_positions
from fisherprune.persample.factors import Factors
from fisherprune.persample.registry import LayerCall, register_layer


class _Linear:
    """Linear, with any positions between the samples and the features."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, *, in] -> [N, *, out]``, as where autograd records the call."""
        if input.dim() > 2 and not input.is_contiguous():  # else one product a position
            flat = input.flatten(0, -2)
            return ops.linear(flat, weight, bias).view(*input.shape[:-1], len(weight))
        return ops.linear(input, weight, bias)

    def input_grad(self, grad: Tensor, input: Tensor | None, weight: Tensor) -> Tensor:
        flat = grad.flatten(0, -2)  # else some strides mean slow products
        return ops.linear(flat, weight.mT).view(*grad.shape[:-1], weight.shape[1])

    def weight_grads(
        self, grad: Tensor, input: Tensor, shape: tuple[int, ...]
    ) -> Factors:
        return Factors(input, grad, shape)

    def bias_grads(self, grad: Tensor) -> Rows:
        return summed_positions(grad.movedim(-1, 1))


@register_layer(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    """Sort the arguments of ``F.linear`` out."""
    return LayerCall(_Linear(), input, weight, bias, weight_dims=2)


@register_layer(torch.inner)
def inner(input: Tensor, other: Tensor) -> LayerCall | None:
    """Sort the arguments of ``torch.inner`` out: of a matrix, it is a linear layer."""
    if other.dim() != 2 or input.dim() < 2:
        return None
    return LayerCall(_Linear(), input, other, None, weight_dims=2)


register_layer(Tensor.inner)(inner)
