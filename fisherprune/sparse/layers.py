"""Layers that hold and execute the kept entries of a weight alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FieldError, shown
from fisherprune.ops.dense import dense_weight, places
from fisherprune.ops.sparse import sparse_conv2d

Dense = TypeVar("Dense", nn.Conv1d, nn.Conv2d, nn.Linear)
LIMIT = 2**31
"""Rows and columns are int32."""


class SparseLayer(nn.Module, Generic[Dense]):
    """What sparse layers share.

    Attributes:
        values: the kept entries ``[K]``, a parameter, in the order of the dense weight.
        bias: ``[O]``, a parameter, or None.
        rows: int32 ``[O + 1]``, a buffer: output o has the entries from ``rows[o]`` to
            ``rows[o + 1]``.
        columns: int32 ``[K]``, a buffer: their places in the flat weights of an output.
        shape: of the dense weight.
        relu: whether what is negative becomes zero at the end.
    """

    dense_kind: ClassVar[type[nn.Module]]
    kept_settings: ClassVar[tuple[str, ...]]
    """Attributes of the dense layer that this one has, too."""

    values: nn.Parameter
    bias: nn.Parameter | None
    rows: Tensor
    columns: Tensor

    def __init__(self, dense: Dense, mask: Tensor, *, relu: bool = False) -> None:
        """Take the kept entries of a dense layer, which stays as it is.

        Its bias is taken as it is, the same parameter.

        Args:
            dense: a layer whose weight is a parameter of its own.
            mask: bool tensor of the weight's shape, True = kept.
            relu: apply a ReLU at the end.

        Raises:
            FisherpruneError: where the layer is of another kind or pads otherwise than
                with zeros, or the mask is no bool tensor of the weight's shape.
        """
        super().__init__()
        self._check(dense, mask)
        weight, mask = dense.weight.detach(), mask.to(dense.weight.device)
        self.shape, self.relu = tuple(weight.shape), bool(relu)
        for name in self.kept_settings:
            setattr(self, name, getattr(dense, name))
        by_output = mask.flatten(1)
        counts = F.pad(by_output.sum(1), (1, 0))
        self.register_buffer("rows", counts.cumsum(0).int())
        self.register_buffer("columns", by_output.nonzero()[:, 1].int())
        self.values = nn.Parameter(weight[mask], dense.weight.requires_grad)
        if dense.weight.grad is not None:
            self.values.grad = dense.weight.grad[mask]
        self.bias = dense.bias  # type: ignore[assignment]  # a parameter, or None
        self.train(dense.training)

    def _check(self, dense: nn.Module, mask: Tensor) -> None:
        where = type(self).__name__
        if not isinstance(dense, self.dense_kind):
            wanted = f"a {self.dense_kind.__name__}"
            raise FieldError(f"{where}: dense", wanted, type(dense).__name__)
        mode = getattr(dense, "padding_mode", "zeros")
        if mode != "zeros":
            raise FieldError(f"{where}: padding_mode", "'zeros'", repr(mode))
        weight: Tensor = dense.weight  # type: ignore[assignment]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise FieldError(f"{where}: mask", "a bool tensor", shown(mask))
        if mask.shape != weight.shape:
            wanted = f"of shape {list(weight.shape)}"
            raise FieldError(f"{where}: mask", wanted, list(mask.shape))
        if weight.numel() >= LIMIT:
            wanted = f"of fewer than {LIMIT} entries"
            raise FieldError(f"{where}: the weight", wanted, weight.numel())

    @property
    def weight(self) -> Tensor:
        """Return the dense weight, computed: zeros where nothing is kept.

        For code that reads a layer's weight; it is no parameter, and to write into it
        changes nothing.
        """
        return dense_weight(self.values, self.rows, self.columns, self.shape)

    def mask(self) -> Tensor:
        """Return which entries of the dense weight are kept, a bool tensor."""
        ones = torch.ones_like(self.columns, dtype=torch.bool)
        return dense_weight(ones, self.rows, self.columns, self.shape)

    def places(self) -> Tensor:
        """Return the flat places of the kept entries in the weight, int64 ``[K]``."""
        return places(self.rows, self.columns, self._width())

    def _width(self) -> int:
        width = 1
        for size in self.shape[1:]:
            width *= size
        return width

    def density(self) -> float:
        """Return the share of entries that are kept."""
        return self.values.numel() / max(1, self.shape[0] * self._width())

    def to_dense(self) -> Dense:
        """Return the dense layer, with zeros where nothing is kept.

        Without the ReLU at the end; its bias is the same parameter.
        """
        weight = self.weight.detach().clone()
        dense = self._empty(self.bias is not None)
        dense.weight = nn.Parameter(weight, self.values.requires_grad)
        if self.values.grad is not None:
            pattern = self.rows, self.columns, self.shape
            dense.weight.grad = dense_weight(self.values.grad, *pattern)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def _empty(self, bias: bool) -> Any:
        """Return a dense layer without memory."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the shape of the weight and how much of it is kept."""
        shape = " x ".join(map(str, self.shape))
        kept = f"{self.values.numel()} of {shape} weights ({self.density():.2%})"
        return f"{kept}, bias={self.bias is not None}" + ", relu=True" * self.relu

    def _sparse(
        self,
        input: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Tensor:
        """Convolve images: by the kernels in float32, in other dtypes densely."""
        pattern, single = (self.rows, self.columns), torch.float32
        if self.values.dtype == single and (
            input.dtype == single or torch.is_autocast_enabled(input.device.type)
        ):
            return sparse_conv2d(
                input,
                self.values,
                *pattern,
                self.bias,
                kernel=(kernel[0], kernel[1]),
                stride=(stride[0], stride[1]),
                padding=(padding[0], padding[1]),
                dilation=(dilation[0], dilation[1]),
                groups=groups,
                relu=self.relu,
            )
        weight = dense_weight(self.values, *pattern, (*self.shape[:2], *kernel))
        options = stride, padding, dilation, groups
        output = F.conv2d(input, weight, self.bias, *options)
        return F.relu(output) if self.relu else output

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        """Load an own state, or that of the dense layer: its zeros are left out."""
        errors: list[str] = args[-1]
        dense = state_dict.get(f"{prefix}weight")
        if dense is not None and f"{prefix}values" not in state_dict:
            del state_dict[f"{prefix}weight"]
            state_dict |= {
                f"{prefix}values": self._kept_of(dense, f"{prefix}weight", errors),
                f"{prefix}rows": self.rows,
                f"{prefix}columns": self.columns,
            }
        self._check_pattern(state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _kept_of(self, dense: Tensor, name: str, errors: list[str]) -> Tensor:
        """Return the kept entries of a dense weight; tell what makes it unfit."""
        if tuple(dense.shape) != self.shape:
            errors.append(
                f"{name!r} must have shape {list(self.shape)}, got {list(dense.shape)}"
            )
            return self.values.detach()
        flat = dense.detach().reshape(-1)
        kept = self.places().to(flat.device)
        values = flat[kept]
        others = int(flat.count_nonzero()) - int(values.count_nonzero())
        if others:
            errors.append(
                f"{name!r} must be zero where the mask keeps nothing, got {others} "
                "other entries there"
            )
        return values

    def _check_pattern(
        self, state: Mapping[str, Tensor], prefix: str, errors: list[str]
    ) -> None:
        for name in ("rows", "columns"):
            mine, theirs = getattr(self, name), state.get(f"{prefix}{name}")
            if theirs is None or mine.is_meta or theirs.is_meta:
                continue
            if mine.shape == theirs.shape and bool((mine != theirs.to(mine)).any()):
                errors.append(
                    f"{prefix + name!r} must be those of the masks that the model was "
                    "compressed by, got others"
                )


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

    def _convolved(self, input: Tensor) -> Tensor:
        """Convolve images, of height 1 where the kernel has no height."""
        low, more = self._pads()
        if any(more):
            input = F.pad(input, [each for m in reversed(more) for each in (0, m)])
        missing = 2 - len(low)
        ones: list[int] = [1] * missing
        return self._sparse(
            input,
            [*ones, *self.kernel_size],
            [*ones, *self.stride],
            [0] * missing + low,
            [*ones, *self.dilation],
            self.groups,
        )

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

    Float32 runs on kernels, whose price is that of the kept entries; other dtypes run
    as the dense layer does. It takes the input of the dense layer, has its attributes,
    and loads its state: entries that are not kept must be zero there.

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

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[N, C, H, W]``, or ``[C, H, W]``, as Conv2d does."""
        self._check_input(input, "H, W")
        if input.dim() == 3:
            return self._convolved(input.unsqueeze(0)).squeeze(0)
        return self._convolved(input)


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
