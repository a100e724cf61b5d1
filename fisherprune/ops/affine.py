"""The gradients of an affine map of each channel, on the CPU: the wrapper's half.

The kernel is in ``csrc/channel_affine``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherprune.ops import kernels as kernels  # registers the op


def channel_affine_backward(
    grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the gradients of an affine map, of its parameters for each sample.

    Of channel c of sample n, as of BatchNorm with running statistics::

        y[n, c] = (x[n, c] - mean[c]) * scale[c] * weight[c] + bias[c]

    With the gradient d of y and ``factor = scale * weight``::

        input_grad[n, c]  = d[n, c] * factor[c]
        weight_grad[n, c] = scale[c] * sum_p d[n, c, p] * (x[n, c, p] - mean[c])
        bias_grad[n, c]   = sum_p d[n, c, p]

    Input and gradient are read from memory once. Deterministic bit for bit, whatever
    the number of threads.

    Args:
        grad: of the output, ``[N, C, *]``, copied where it lies otherwise than input;
            all tensors are float32 on the CPU.
        input: ``[N, C, *]``, contiguous, or with its channels last: the axis of the
            channels is the fastest in memory, and the others lie in order.
        mean: ``[C]``, contiguous.
        scale: the same.
        factor: the same.

    Returns:
        The gradients of the input, ``[N, C, *]``, which lies like it, and of weight and
        bias, ``[N, C]``.

    Raises:
        RuntimeError: on other shapes, dtypes, devices or layouts.
    """
    return torch.ops.fisherprune.channel_affine_backward.default(
        grad, input, mean, scale, factor
    )


@torch.library.register_fake("fisherprune::channel_affine_backward")
def _(
    grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    own = input.shape[:2]
    return torch.empty_like(input), input.new_empty(own), input.new_empty(own)
