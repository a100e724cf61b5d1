"""The sparse layers, one for each dense kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FieldError
from fisherprune.sparse.base import Dense, SparseLayer


class _SparseConv(SparseLayer[Dense]):
    """What convolutions share."""

    kept_settings = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
        *("dilation", "groups", "padding_mode"),
    )
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int

    def _pads(self) -> tuple[list[int], list[int]]:
        """Return the padding on both sides, and how much more there is at the end."""
        if not isinstance(self.padding, str):
            return list(self.padding), [0] * len(self.padding)
        same = self.padding == "same"
        axes = zip(self.kernel_size, self.dilation, strict=True)
        totals = [same * d * (k - 1) for k, d in axes]
        return [t // 2 for t in totals], [t % 2 for t in totals]

    def _convolved(
        self, input: Tensor, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Convolve images, of height 1 where the kernel has no height."""
        low: Sequence[int]
        if isinstance(self.padding, str):
            low, more = self._pads()
            if any(more):
                input = F.pad(input, [each for m in reversed(more) for each in (0, m)])
        else:
            low = self.padding
        kernel: Sequence[int] = self.kernel_size
        stride: Sequence[int] = self.stride
        dilation: Sequence[int] = self.dilation
        if len(low) == 1:
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
            low = 0, *low
        options = stride, low, dilation, self.groups
        return self._sparse(input, kernel, *options, residual, relu)

    def _check_input(self, input: Tensor, axes: str) -> None:
        dims = len(self.kernel_size) + 1
        if input.dim() not in (dims, dims + 1) or input.shape[-dims] != (
            self.in_channels
        ):
            wanted = f"of shape [N, {self.in_channels}, {axes}] or without the N"
            name = f"{type(self).__name__}: input"
            raise FieldError(name, wanted, list(input.shape))

    def _empty(self, bias: bool) -> Any:
        settings = {n: getattr(self, n) for n in self.kept_settings}
        return self.dense_kind(**settings, bias=bias, device="meta")


class SparseConv2d(_SparseConv[nn.Conv2d]):
    """A ``torch.nn.Conv2d`` that executes the kept entries of its weight alone.

    Float32 runs on kernels, whose price is that of the kept entries; so does autocast,
    to bfloat16 with images in bfloat16. Other dtypes run as the dense layer does. It
    takes the input of the dense layer, has its attributes, and loads its state: entries
    that are not kept must be zero there.

    Args:
        dense: a Conv2d that pads with zeros.
        mask: bool tensor of its weight's shape, True = kept.
        relu: apply a ReLU at the end.

    Raises:
        FisherpruneError: where they are not.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(2, 3, 3, padding=1)
        >>> mask = torch.rand(conv.weight.shape) < 0.5
        >>> conv.weight.data[~mask] = 0
        >>> sparse, image = SparseConv2d(conv, mask), torch.randn(4, 2, 8, 8)
        >>> torch.allclose(sparse(image), conv(image), atol=1e-5)
        True
        >>> sparse.values.shape == (mask.sum(),)
        True
    """

    dense_kind = nn.Conv2d

    def forward(
        self, input: Tensor, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Convolve ``[N, C, H, W]``, or ``[C, H, W]``, as Conv2d does.

        Args:
            input: images.
            residual: is added to the output; anything that can be.
            relu: whether a ReLU follows.
        """
        self._check_input(input, "H, W")
        if input.dim() == 3:
            input = input.unsqueeze(0)
            end = None if residual is None else residual.unsqueeze(0)
            return self.forward(input, end, relu).squeeze(0)
        if residual is None or self._takes(residual, input):
            return self._convolved(input, residual, relu)
        output = self._convolved(input) + residual
        return F.relu(output) if relu else output

    def _takes(self, residual: Tensor, input: Tensor) -> bool:
        """Return whether the sum needs neither another dtype nor another shape."""
        if residual.dtype != self._result_dtype(input):
            return False
        pads = [2 * low + more for low, more in zip(*self._pads(), strict=True)]
        axes = zip(
            *(input.shape[2:], self.kernel_size, self.stride, pads, self.dilation),
            strict=True,
        )
        positions = [(n + p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        return residual.shape == (input.shape[0], self.out_channels, *positions)


class SparseConv1d(_SparseConv[nn.Conv1d]):
    """A ``torch.nn.Conv1d`` that executes the kept entries of its weight alone.

    See ``SparseConv2d``.

    Args:
        dense: a Conv1d that pads with zeros.
        mask: bool tensor of its weight's shape, True = kept.
        relu: apply a ReLU at the end.

    Raises:
        FisherpruneError: where they are not.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv1d(2, 3, 5, bias=False)
        >>> sparse = SparseConv1d(conv, torch.zeros(3, 2, 5) > 0)
        >>> sparse(torch.ones(1, 2, 6)).shape, sparse.values.numel()
        (torch.Size([1, 3, 2]), 0)
    """

    dense_kind = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[N, C, L]``, or ``[C, L]``, as Conv1d does."""
        self._check_input(input, "L")
        if input.dim() == 2:
            return self._convolved(input[None, :, None]).squeeze((0, 2))
        return self._convolved(input.unsqueeze(2)).squeeze(2)


class SparseLinear(SparseLayer[nn.Linear]):
    """A ``torch.nn.Linear`` that executes the kept entries of its weight alone.

    See ``SparseConv2d``.

    Args:
        dense: a Linear.
        mask: bool tensor of its weight's shape, True = kept.
        relu: apply a ReLU at the end.

    Raises:
        FisherpruneError: where they are not.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(3, 2, bias=False)
        >>> linear.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> sparse = SparseLinear(linear, linear.weight > 4)
        >>> sparse(torch.ones(1, 3)).tolist(), sparse.values.tolist()
        ([[0.0, 11.0]], [5.0, 6.0])
    """

    dense_kind = nn.Linear
    kept_settings = ("in_features", "out_features")
    in_features: int
    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        """Transform ``[*, in]`` into ``[*, out]`` as Linear does."""
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            wanted = f"of shape [*, {self.in_features}]"
            raise FieldError("SparseLinear: input", wanted, list(input.shape))
        positions = input.reshape(-1, self.in_features)[:, :, None, None]
        output = self._sparse(positions, (1, 1))
        return output.reshape(*input.shape[:-1], self.out_features)

    def _empty(self, bias: bool) -> Any:
        sizes = self.in_features, self.out_features
        return nn.Linear(*sizes, bias=bias, device="meta")


KINDS: dict[type[nn.Module], type[SparseLayer]] = {
    each.dense_kind: each for each in (SparseConv1d, SparseConv2d, SparseLinear)
}
"""The sparse layer of each dense one; subclasses may compute something else."""
