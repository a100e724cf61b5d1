"""Linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from fisherprune.persample.contributions import Factors, summed_positions
from fisherprune.persample.layers.base import Call


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


def linear(input, weight, bias=None):
    """Sort the arguments of ``F.linear`` out."""
    return Call(LinearLayer(), input, weight, bias, dims=None)
