"""Images whose samples lie innermost, and others, made of each other.

Kernels are in ``csrc/transpose`` for float32 and bfloat16 on the CPU: there PyTorch's
copies take several times as long as to read and write the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherprune.ops import kernels as kernels  # registers the ops


def lies_innermost(x: Tensor) -> bool:
    """Return whether ``[N, C, H, W]`` lies in memory as ``[C, H, W, N]`` alone."""
    return x.dim() == 4 and x.permute(1, 2, 3, 0).is_contiguous()


def samples_innermost(x: Tensor) -> Tensor:
    """Return ``[N, C, H, W]`` as a tensor that lies in memory as ``[C, H, W, N]``.

    Differentiable; the gradient is made contiguous in the same way.

    Example:
        >>> import torch
        >>> samples_innermost(torch.randn(5, 2, 3, 4)).stride()
        (1, 60, 20, 5)
    """
    if lies_innermost(x):
        return x
    if not (x.is_contiguous() and _has_kernel(x)):
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    n, *image = x.shape
    return _transposed(x.reshape(n, -1)).view(*image, n).permute(3, 0, 1, 2)


def contiguous(x: Tensor) -> Tensor:
    """Return ``[N, C, H, W]`` as a contiguous tensor.

    As ``Tensor.contiguous``; faster where the samples lie innermost.

    Example:
        >>> import torch
        >>> contiguous(samples_innermost(torch.randn(5, 2, 3, 4))).is_contiguous()
        True
    """
    if x.is_contiguous() or not (lies_innermost(x) and _has_kernel(x)):
        return x.contiguous()
    n, *image = x.shape
    return _transposed(x.permute(1, 2, 3, 0).reshape(-1, n)).view(n, *image)


def lying_as(model: Tensor, x: Tensor) -> Tensor:
    """Return a tensor as another one lies, or itself where only PyTorch could copy it.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 2, 3, 4)
        >>> lying_as(x, samples_innermost(x)).is_contiguous()
        True
    """
    if model.is_contiguous():
        return contiguous(x)
    return samples_innermost(x) if lies_innermost(model) else x


def _has_kernel(x: Tensor) -> bool:
    known = x.dtype in (torch.float32, torch.bfloat16)
    return x.device.type == "cpu" and known and x.numel() > 0


def _transposed(matrix: Tensor) -> Tensor:
    return torch.ops.fisherprune.transpose(matrix)


@torch.library.register_fake("fisherprune::transpose")
def _(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape[::-1])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _transposed(grad.contiguous())


torch.library.register_autograd("fisherprune::transpose", _backward)
