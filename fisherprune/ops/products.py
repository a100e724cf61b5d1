"""Products with a weight on the CPU, by the quicker of two libraries that PyTorch has.

PyTorch multiplies matrices by MKL, and runs convolutions by oneDNN. MKL uses vectors of
256 bits on all processors of AMD; from Zen 5 on they have units for 512, which oneDNN
uses.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.ops import kernels

LEAST = 1 << 21
"""Multiplications of a product from which on it is worth what oneDNN prepares."""


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    onednn: bool | None = None,
) -> Tensor:
    """Return ``F.linear(input, weight, bias)`` up to rounding, without a gradient.

    Args:
        input: ``[*, in]``.
        weight: ``[out, in]``, of any strides.
        bias: ``[out]``, or None for zeros.
        onednn: whether it runs where it can: on the CPU, in float32, for large
            products, without autocast. None: where MKL does not use all of the
            processor's vectors.

    Example:
        >>> import torch
        >>> from fisherprune import ops
        >>> ops.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    wanted = _is_quicker() if onednn is None else onednn
    if not wanted or not _can_run(input, weight, bias):
        return F.linear(input, weight, bias)
    if not weight.is_contiguous() and not weight.mT.is_contiguous():
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(
        input, weight, bias, "none", [], ""
    )


@cache
def _is_quicker() -> bool:
    return kernels.mkl_is_narrow() and torch.backends.mkl.is_available()


def _can_run(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if input.numel() * weight.shape[0] < LEAST or torch.is_autocast_enabled("cpu"):
        return False
    read = (input, weight) if bias is None else (input, weight, bias)
    return (
        all(t.is_cpu and t.dtype == torch.float32 for t in read)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
