"""How the sparse convolutions are traced and differentiated.

The convolution is linear in its input and in its values, so are both of its gradients
in what they take: each of the three is differentiated by the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherprune.ops.dense import empty_output, result_dtype

Sizes = Sequence[int]
OPS = torch.ops.fisherprune


def _positions(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


@torch.library.register_fake("fisherprune::sparse_conv2d")
def _(
    input: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    axes = zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    positions = [_positions(*axis) for axis in axes]
    size = [input.shape[0], rows.shape[0] - 1, *positions]
    return empty_output(values, size, result_dtype(input, values))


@torch.library.register_fake("fisherprune::sparse_conv2d_input")
def _(
    input_size: Sizes,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    *_: Any,
) -> Tensor:
    return empty_output(values, input_size, result_dtype(grad, values))


@torch.library.register_fake("fisherprune::sparse_conv2d_weight")
def _(input: Tensor, rows: Tensor, columns: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(columns.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, rows, columns, _, *options, relu, _ = inputs
    by_input, by_values = ctx.needs_input_grad[:2]
    ctx.options, ctx.input_size, ctx.sums = options, input.shape, values.dtype
    ctx.save_for_backward(
        input if by_values else None,
        values if by_input else None,
        rows,
        columns,
        output if relu else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, rows, columns, output = ctx.saved_tensors
    by_input, by_values, _, _, by_bias = ctx.needs_input_grad[:5]
    by_residual = ctx.needs_input_grad[-1]
    if output is not None:
        grad = torch.where(output > 0, grad, 0)
    size, pattern = ctx.input_size, (rows, columns)
    return (
        OPS.sparse_conv2d_input(size, values, *pattern, grad, *ctx.options)
        if by_input
        else None,
        OPS.sparse_conv2d_weight(input, *pattern, grad, *ctx.options)
        if by_values
        else None,
        None,
        None,
        _by_channel(grad, ctx.sums) if by_bias else None,
        *[None] * 6,
        grad if by_residual else None,
    )


def _by_channel(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the bias: the sum of each channel, in its dtype.

    PyTorch would widen all of a gradient in bfloat16 before. A bias is the weight of a
    channel of ones.
    """
    if grad.dtype == dtype or grad.device.type != "cpu":
        return grad.sum((0, 2, 3), dtype=dtype)
    samples, outputs, *image = grad.shape
    ones = grad.new_ones(samples, 1, 1, 1).expand(-1, -1, *image)
    rows = torch.arange(outputs + 1, dtype=torch.int32)
    form = (1, 1), (1, 1), (0, 0), (1, 1), 1
    return OPS.sparse_conv2d_weight(ones, rows, torch.zeros_like(rows[1:]), grad, *form)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.input_size, values, rows, columns, grad, *ctx.options = inputs
    ctx.save_for_backward(values, rows, columns, grad)


def _backward_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, rows, columns, outer = ctx.saved_tensors
    by_values, by_grad = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    return (
        None,
        OPS.sparse_conv2d_weight(grad, rows, columns, outer, *ctx.options)
        if by_values
        else None,
        None,
        None,
        OPS.sparse_conv2d(grad, values, rows, columns, None, *ctx.options)
        if by_grad
        else None,
        *[None] * 5,
    )


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rows, columns, grad, *ctx.options = inputs
    ctx.save_for_backward(input, rows, columns, grad)


def _backward_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, rows, columns, outer = ctx.saved_tensors
    by_input, by_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    size, pattern, grad = input.shape, (rows, columns), grad.contiguous()
    return (
        OPS.sparse_conv2d_input(size, grad, *pattern, outer, *ctx.options)
        if by_input
        else None,
        None,
        None,
        OPS.sparse_conv2d(input, grad, *pattern, None, *ctx.options)
        if by_grad
        else None,
        *[None] * 5,
    )


for name, backward, save in (
    ("sparse_conv2d", _backward, _save),
    ("sparse_conv2d_input", _backward_input, _save_input),
    ("sparse_conv2d_weight", _backward_weight, _save_weight),
):
    torch.library.register_autograd(
        f"fisherprune::{name}", backward, setup_context=save
    )
