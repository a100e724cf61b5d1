"""Max-pooling of images whose samples lie innermost: the wrappers' half.

Kernels are in ``csrc/max_pool`` for the CPU. On CUDA the twin in ``reference.py`` does
the work. Gradients are registered here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.ops import kernels as kernels  # registers the ops
from fisherprune.ops import reference
from fisherprune.ops.layout import samples_innermost

Pair = tuple[int, int]

MOST_PLACES = 255
"""Of a window: a place is a byte."""


def max_pool2d(
    input: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the largest entry of each window, and where it is in the window.

    ``torch.nn.functional.max_pool2d`` in the layout of sparse execution, in which
    memory is ``[C, H, W, N]``. The place is ``y * kernel[1] + x`` of the first maximum,
    or of the last NaN; a byte is all that the backward pass reads of the forward pass.
    ``output`` has gradients; there are no second derivatives.

    Args:
        input: ``[N, C, H, W]``, float32 or bfloat16. Other layouts are copied.
        kernel: rows and columns of a window, at most 255 places.
        stride: from a window to the next; None: the windows lie side by side.
        padding: on both sides, at most half of the kernel; it is never the maximum.
        ceil_mode: whether windows may end outside of image and padding.

    Returns:
        The output ``[N, C, P, Q]`` in the dtype of the input, and the places, uint8;
        the samples of both lie innermost.

    Raises:
        RuntimeError: on other shapes, dtypes, kernels, strides or paddings.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[[1.0, 5.0], [7.0, 2.0]]]])
        >>> max_pool2d(x, (2, 2))
        (tensor([[[[7.]]]]), tensor([[[[2]]]], dtype=torch.uint8))
    """
    return torch.ops.fisherprune.max_pool2d(
        input, kernel, stride or kernel, padding, ceil_mode
    )


def pooled_size(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool
) -> int:
    """Return how many windows PyTorch places along an axis."""
    span = size + 2 * padding - kernel
    steps = (span + (stride - 1 if ceil_mode else 0)) // stride
    return steps if steps * stride >= size + padding else steps + 1


def _new(like: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    n, *others = size
    return like.new_empty((*others, n), dtype=dtype).permute(3, 0, 1, 2)


@torch.library.register_fake("fisherprune::max_pool2d")
def _(
    input: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    image = [
        pooled_size(*axis, ceil_mode)
        for axis in zip(input.shape[2:], kernel, stride, padding, strict=True)
    ]
    size = (*input.shape[:2], *image)
    return _new(input, size, input.dtype), _new(input, size, torch.uint8)


@torch.library.register_fake("fisherprune::max_pool2d_backward")
def _(
    grad: Tensor,
    index: Tensor,
    input_size: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool = False,
) -> Tensor:
    return _new(grad, input_size, grad.dtype)


@torch.library.impl("fisherprune::max_pool2d", "CUDA")
def _(
    input: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    output, index = reference.max_pool2d(input, kernel, stride, padding, ceil_mode)
    return samples_innermost(output), samples_innermost(index)


@torch.library.impl("fisherprune::max_pool2d_backward", "CUDA")
def _(
    grad: Tensor,
    index: Tensor,
    input_size: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool = False,
) -> Tensor:
    return samples_innermost(
        reference.max_pool2d_backward(grad, index, input_size, kernel, stride, padding)
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.options = inputs
    ctx.size = input.shape
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    grad_input = torch.ops.fisherprune.max_pool2d_backward(
        grad, *ctx.saved_tensors, ctx.size, *ctx.options
    )
    return grad_input, *(None for _ in ctx.options)


torch.library.register_autograd(
    "fisherprune::max_pool2d", _gradients, setup_context=_save
)


def _refuse(ctx: Any, *_: Tensor) -> tuple:
    raise FisherpruneError(
        "max_pool2d: there are no second derivatives: use "
        "torch.nn.functional.max_pool2d where a gradient is differentiated again"
    )


torch.library.register_autograd("fisherprune::max_pool2d_backward", _refuse)
