"""Batch normalization in training mode, with residual and ReLU: the wrappers' half.

Kernels are in ``csrc/batch_norm`` for the CPU. On CUDA the twin in ``reference.py``
does the work. Gradients are registered here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.ops import kernels as kernels  # registers the ops
from fisherprune.ops import reference
from fisherprune.ops.layout import lying_as


def batch_norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalize each channel by the mean and variance of the batch, in one pass.

    With the mean :math:`\mu_c` and the biased variance :math:`\sigma^2_c` of channel c
    over samples and positions::

        scale  = 1 / sqrt(variance + eps)
        output = relu?((input - mean) * scale * weight + bias + residual)

    A channel is read from memory once where it fits into a cache, forward and backward.
    The mean may be many times the deviation: channels are measured about their mean.
    Deterministic bit for bit on a given device, whatever the number of threads.
    ``output`` has gradients, the other two results have none; there are no second
    derivatives.

    Args:
        input: ``[N, C, *]``, float32 or bfloat16; at least one entry. Dense tensors are
            read where they are, in any layout, fastest where the entries of a channel
            lie together; others are copied.
        residual: added before the ReLU, or None; like the input.
        weight: float32 ``[C]``, or None for 1.
        bias: float32 ``[C]``, or None for 0.
        eps: added to the variance, at least 0.
        relu: whether negative outputs become 0.

    Returns:
        The output, in the layout of the input, and mean and scale, float32 ``[C]``.

    Raises:
        RuntimeError: on other shapes, dtypes, devices or eps.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> output, mean, scale = batch_norm(x, eps=0.25, relu=True)
        >>> output, mean, scale
        (tensor([[0.0000, 0.0000],
                [0.8944, 0.0000]]), tensor([2., 5.]), tensor([0.8944, 2.0000]))
    """
    return torch.ops.fisherprune.batch_norm(input, residual, weight, bias, eps, relu)


def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    *,
    relu: bool = False,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``batch_norm``.

    With ``g = grad`` where there is no ReLU or output > 0, else 0, with ``xhat`` the
    normalized input, and with means over a channel::

        grad_input    = weight * scale * (g - mean(g) - xhat * mean(g * xhat))
        grad_residual = g
        grad_weight   = sum g * xhat
        grad_bias     = sum g

    Args:
        grad: gradient with respect to the output; shape and dtype of the input.
        input: of ``batch_norm``.
        output: of ``batch_norm``; it is read where there is a ReLU.
        weight: of ``batch_norm``.
        mean: what ``batch_norm`` returned.
        scale: what ``batch_norm`` returned.
        relu: whether the output went through a ReLU.
        residual: whether the residual's gradient is wanted.

    Returns:
        Gradients of input, residual (empty where it is not wanted), weight and bias.

    Raises:
        RuntimeError: on shapes, dtypes or devices that do not belong together.
    """
    return torch.ops.fisherprune.batch_norm_backward(
        grad, input, output, weight, mean, scale, relu, residual
    )


@torch.library.register_fake("fisherprune::batch_norm")
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), _channels(input), _channels(input)


@torch.library.register_fake("fisherprune::batch_norm_backward")
def _(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual = torch.empty_like(input) if residual else input.new_empty(0)
    return torch.empty_like(input), grad_residual, _channels(input), _channels(input)


def _channels(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=torch.float32)


def _lying_as(input: Tensor, result: Tensor) -> Tensor:
    """Return a result in the layout that the op promises."""
    return torch.empty_like(input).copy_(result)


@torch.library.impl("fisherprune::batch_norm", "CUDA")
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, scale = reference.batch_norm(
        input, residual, weight, bias, eps=eps, relu=relu
    )
    return _lying_as(input, output), mean, scale


@torch.library.impl("fisherprune::batch_norm_backward", "CUDA")
def _(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = reference.batch_norm_backward(
        grad, input, output, weight, mean, scale, relu=relu, residual=residual
    )
    grad_residual = _lying_as(input, grads[1]) if residual else grads[1]
    return _lying_as(input, grads[0]), grad_residual, *grads[2:]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, _, weight, _, _, ctx.relu = inputs
    result, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    # Without a ReLU no output is read: the input stands for it.
    ctx.save_for_backward(input, result if ctx.relu else input, weight, mean, scale)


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    grad = lying_as(ctx.saved_tensors[0], grad)  # slow by the op itself
    # Without a ReLU the residual's gradient is the output's.
    kept = ctx.relu and ctx.needs_input_grad[1]
    grad_input, grad_residual, *rest = torch.ops.fisherprune.batch_norm_backward(
        grad, *ctx.saved_tensors, ctx.relu, kept
    )
    grads = (grad_input, grad_residual if kept else grad, *rest)
    needs = ctx.needs_input_grad[:4]
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return *wanted, None, None


torch.library.register_autograd(
    "fisherprune::batch_norm", _gradients, setup_context=_save
)


def _refuse(ctx: Any, *_: Tensor) -> tuple:
    raise FisherpruneError(
        "batch_norm: there are no second derivatives: use torch.nn.BatchNorm2d or the "
        "like where a gradient is differentiated again"
    )


torch.library.register_autograd("fisherprune::batch_norm_backward", _refuse)
