"""Convolutions by the kept entries of a weight: typed thin wrappers over the ops.

``rules.py`` says how they are differentiated and traced, ``autocast.py`` in which
dtypes autocast runs them, ``dense.py`` what runs on devices without kernels of their
own, ``reference.py`` has a twin of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherprune.ops import autocast as autocast  # registers the rule
from fisherprune.ops import dense as dense  # registers the bodies
from fisherprune.ops import rules as rules  # registers fakes and gradients

Pair = tuple[int, int]


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Convolve with a weight of which only the kept entries are given.

    The entries :math:`i` with ``rows[o] <= i < rows[o + 1]`` are those of output
    channel o; ``columns[i]`` is the flat place :math:`(c Y + y) X + x` within that
    channel's weights ``[C / groups, Y, X]``, ascending:

    .. math:: y_{nopq} = b_o + r_{nopq} + \sum_i v_i\, x_{n c' h w}, \quad
        h = p s_h - p_h + y d_h, \quad w = q s_w - p_w + x d_w

    with :math:`c'` the channel c of o's group and zeros outside of the image. The cost
    is that of the kept entries alone. Differentiable, twice too, by ``input``,
    ``values``, ``bias`` and ``residual``. It computes in float32, also of images of 16
    bits; of images in bfloat16 the result is rounded to bfloat16, once. Autocast to
    bfloat16 takes input and residual in it, values and bias in float32; other autocast
    takes all in float32. The CPU's result is the same bit for bit whatever the number
    of threads.

    Args:
        input: ``[N, C, H, W]``, float32, float16 or bfloat16, any strides.
        values: float32 ``[K]``, the kept entries.
        rows: int32 ``[O + 1]``, from 0 to K, not descending.
        columns: int32 ``[K]``, ascending within a row.
        bias: float32 ``[O]`` or None.
        kernel: its height and width ``(Y, X)``.
        stride: of the convolution.
        padding: of the convolution, zeros on both sides.
        dilation: of the convolution.
        groups: of the convolution.
        relu: replace what is negative by zero, in the end.
        residual: ``[N, O, P, Q]`` that is added, in the dtype of the output, or None.
            Layouts other than that of the output are copied.

    Returns:
        ``[N, O, P, Q]``, bfloat16 if ``input`` is, else float32. On CPUs with samples
        innermost: it lies in memory as ``[O, P, Q, N]``. It is no view of another
        tensor.

    Raises:
        RuntimeError: on shapes, dtypes or devices that do not belong together.

    Example:
        >>> import torch
        >>> image = torch.arange(4.0).view(1, 1, 2, 2)
        >>> rows = torch.tensor([0, 1], dtype=torch.int32)
        >>> columns = torch.tensor([3], dtype=torch.int32)  # lower right of 2 x 2
        >>> sparse_conv2d(image, torch.tensor([10.0]), rows, columns, kernel=(2, 2))
        tensor([[[[30.]]]])
    """
    return torch.ops.fisherprune.sparse_conv2d(
        input,
        values,
        rows,
        columns,
        bias,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        relu,
        residual,
    )


def sparse_conv2d_input(
    input_size: Sequence[int],
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    r"""Return the gradient of ``sparse_conv2d`` with respect to its input.

    .. math:: g^x_{nchw} = \sum_{i, p, q} v_i\, g_{nopq}

    over the entries and positions that read the place. Differentiable by ``values`` and
    ``grad``.

    Args:
        input_size: ``[N, C, H, W]`` of the input.
        values: as of ``sparse_conv2d``, as are ``rows``, ``columns`` and the options.
        rows: where each output's entries begin.
        columns: the places within an output's weights.
        grad: ``[N, O, P, Q]``, float32, float16 or bfloat16, any strides.
        kernel: its height and width.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        A tensor of ``input_size``, bfloat16 if ``grad`` is, else float32; on CPUs with
        samples innermost.

    Raises:
        RuntimeError: on shapes, dtypes or devices that do not belong together.
    """
    return torch.ops.fisherprune.sparse_conv2d_input(
        input_size,
        values,
        rows,
        columns,
        grad,
        kernel,
        stride,
        padding,
        dilation,
        groups,
    )


def sparse_conv2d_weight(
    input: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    r"""Return the gradient of ``sparse_conv2d`` with respect to the kept entries.

    .. math:: g^v_i = \sum_{n, p, q} g_{nopq}\, x_{n c' h w}

    The gradients of other entries of the weight are never computed. Differentiable by
    ``input`` and ``grad``.

    Args:
        input: ``[N, C, H, W]``, float32, float16 or bfloat16, any strides.
        rows: as of ``sparse_conv2d``, as are ``columns`` and the options.
        columns: the places within an output's weights.
        grad: ``[N, O, P, Q]``, float32, float16 or bfloat16, any strides.
        kernel: its height and width.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        float32 ``[K]``.

    Raises:
        RuntimeError: on shapes, dtypes or devices that do not belong together.
    """
    return torch.ops.fisherprune.sparse_conv2d_weight(
        input, rows, columns, grad, kernel, stride, padding, dilation, groups
    )
