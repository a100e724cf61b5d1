"""Sparse convolutions by dense ones: what devices without kernels of their own run.

The kept values are scattered into a dense weight of zeros, PyTorch's own convolution
does the rest, and gradients are gathered at the kept places. Right everywhere, in any
dtype of PyTorch's convolutions, at the price of the dense layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as gradients

from fisherprune.ops import kernels as kernels  # registers the ops

OTHERS = ("CUDA", "XPU", "MPS", "PrivateUse1")
"""Dispatch keys of devices that run dense where the library has no kernel."""


def dense_weight(
    values: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int]
) -> Tensor:
    """Return the weight of which ``values`` are kept, zeros elsewhere; differentiable.

    Args:
        values: ``[K]``, of any dtype.
        rows: int32 ``[O + 1]``, where each output's entries begin.
        columns: int32 ``[K]``, flat within an output's weights.
        shape: of the weight, ``[O, ...]``.
    """
    outputs, width = shape[0], _product(shape[1:])
    flat = values.new_zeros(outputs * width)
    return flat.scatter(0, places(rows, columns, width), values).view(list(shape))


def places(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Return the flat indices of the kept entries, int64 ``[K]``, ascending."""
    outputs = torch.arange(rows.shape[0] - 1, device=rows.device)
    counts = rows.diff().long()
    owners = outputs.repeat_interleave(counts, output_size=columns.shape[0])
    return owners * width + columns


def result_dtype(images: Tensor, values: Tensor) -> torch.dtype:
    """Return the dtype of what a convolution returns, and of its input's gradient.

    All is computed in the dtype of the values; of images in bfloat16, it is rounded to
    bfloat16 once, at the end.
    """
    return images.dtype if images.dtype == torch.bfloat16 else values.dtype


def empty_innermost(
    like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``[N, C, H, W]`` that lies in memory as ``[C, H, W, N]``.

    It is no view of another tensor: what an op returns may be changed in place, by
    ``ReLU(inplace=True)`` say, which autograd forbids for views.
    """
    n, _, height, width = size
    strides = (1, height * width * n, width * n, n)
    return like.new_empty_strided(list(size), strides, dtype=dtype)


def empty_output(
    like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Return what an op writes its output into: on others than CPUs, a plain tensor."""
    if like.device.type == "cpu":
        return empty_innermost(like, size, dtype)
    return like.new_empty(list(size), dtype=dtype)


def laid_out(x: Tensor) -> Tensor:
    """Return the same entries as an op returns them on the device."""
    return empty_output(x, x.shape).copy_(x) if x.device.type == "cpu" else x


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _sparse_conv2d(
    input: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    shape = rows.shape[0] - 1, input.shape[1] // groups, *kernel
    weight = dense_weight(values, rows, columns, shape)
    images = input.to(values.dtype)
    output = F.conv2d(images, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        output += residual
    output = output.relu_() if relu else output
    return laid_out(output.to(result_dtype(input, values)))


def _sparse_conv2d_input(
    input_size: Sequence[int],
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    shape = rows.shape[0] - 1, input_size[1] // groups, *kernel
    weight = dense_weight(values, rows, columns, shape)
    options = stride, padding, dilation, groups
    found = gradients.conv2d_input(input_size, weight, grad.to(values.dtype), *options)
    return laid_out(found.to(result_dtype(grad, values)))


def _sparse_conv2d_weight(
    input: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    shape = rows.shape[0] - 1, input.shape[1] // groups, *kernel
    options = stride, padding, dilation, groups
    dtype = torch.promote_types(input.dtype, torch.float32)
    dense = gradients.conv2d_weight(input.to(dtype), shape, grad.to(dtype), *options)
    return dense.flatten()[places(rows, columns, _product(shape[1:]))]


BODIES: dict[str, Callable[..., Tensor]] = {
    "sparse_conv2d": _sparse_conv2d,
    "sparse_conv2d_input": _sparse_conv2d_input,
    "sparse_conv2d_weight": _sparse_conv2d_weight,
}

_REGISTRATIONS = torch.library.Library("fisherprune", "IMPL")
"""As long as it lives, the bodies are registered."""


def has_kernel(op: str, key: str) -> bool:
    """Return whether an op has a body for a dispatch key, ``"CPU"`` say."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fisherprune::{op}", key)


def run_densely(keys: Sequence[str]) -> None:
    """Register the bodies for dispatch keys where the library has none of its own."""
    for key in keys:
        for name, body in BODIES.items():
            if not has_kernel(name, key):
                _REGISTRATIONS.impl(name, body, key)


run_densely(OTHERS)
