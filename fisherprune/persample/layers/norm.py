"""BatchNorm with running statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.persample.contributions import summed_positions
from fisherprune.persample.layers.base import Call


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


def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """Sort the arguments of ``F.batch_norm`` out."""
    if training or running_mean is None or running_var is None:
        raise FisherpruneError(
            "a BatchNorm layer uses batch statistics, which mix the samples; it must "
            "run in eval mode with running statistics"
        )
    layer = BatchNormLayer(running_mean, running_var, eps)
    return Call(layer, input, weight, bias, dims=None)
