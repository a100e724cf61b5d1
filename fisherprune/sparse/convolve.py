"""Dense convolutions between sparse ones."""

from __future__ import annotations

from torch import Tensor, nn

from fisherprune.ops.layout import contiguous, lies_innermost, samples_innermost


class Conv2d(nn.Conv2d):
    """A dense convolution that reads and writes images whose samples lie innermost.

    ``torch.nn.Conv2d`` copies such images slowly, and what it returns, and the gradient
    of its input, lie otherwise. Here both are copied, at the speed of memory on CPUs.
    Arguments and results are those of ``torch.nn.Conv2d``.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 6, 6, 8).permute(3, 0, 1, 2)
        >>> Conv2d(4, 5, 3, padding=1)(x).stride()
        (1, 288, 48, 8)
    """

    kind: type[nn.Conv2d] | None = None
    """The module of ``torch.nn`` whose place this one has."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        if not lies_innermost(input) or input.is_contiguous():
            return super().forward(input)
        return samples_innermost(super().forward(contiguous(input)))
