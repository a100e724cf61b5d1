"""Max-pooling as a module that keeps the layout of sparse execution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisherprune import ops
from fisherprune.ops.layout import lies_innermost


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling that has kernels for images whose samples lie innermost.

    ``torch.nn.MaxPool2d`` copies such images and loses their layout. All others, and
    what the op ``fisherprune.ops.max_pool2d`` has not (dilation, indices, other
    dtypes than float32 and bfloat16), are left to it. Arguments and results are those
    of ``torch.nn.MaxPool2d``.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 6, 6, 8).permute(3, 0, 1, 2)
        >>> MaxPool2d(2)(x).stride()
        (1, 72, 24, 8)
    """

    kind: type[nn.MaxPool2d] | None = None
    """The module of ``torch.nn`` whose place this one has."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the largest entry of each window."""
        if not self._has_kernel(input):
            return super().forward(input)
        stride = self.kernel_size if self.stride is None else self.stride
        kernel, stride, padding = map(_pair, (self.kernel_size, stride, self.padding))
        return ops.max_pool2d(input, kernel, stride, padding, self.ceil_mode)[0]

    def _has_kernel(self, x: Tensor) -> bool:
        rows, columns = _pair(self.kernel_size)
        return (
            x.dim() == 4
            and x.dtype in (torch.float32, torch.bfloat16)
            and lies_innermost(x)
            and (not x.is_contiguous() or _is_one_image(x))
            and not self.return_indices
            and _pair(self.dilation) == (1, 1)
            and rows * columns <= ops.MOST_PLACES
        )


def _is_one_image(x: Tensor) -> bool:
    """Return whether the kernels take its positions together: they have no gradient."""
    return x.shape[0] == 1 and not (torch.is_grad_enabled() and x.requires_grad)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second
