"""What all sparse layers are: kept values, their pattern, and the dense state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherprune.errors import FieldError, shown
from fisherprune.ops import sparse as sparse  # registers the op
from fisherprune.ops.autocast import images_dtype
from fisherprune.ops.dense import dense_weight, places

Dense = TypeVar("Dense", nn.Conv1d, nn.Conv2d, nn.Linear)
OP = torch.ops.fisherprune.sparse_conv2d.default
"""Without the wrapper, whose time counts where layers are short."""
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
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Convolve images: by the kernels with float32 values, else densely."""
        values, bias, pattern = self.values, self.bias, (self.rows, self.columns)
        options, single = (stride, padding, dilation, groups), torch.float32
        relu = relu or self.relu
        if values.dtype == single and (
            input.dtype == single or torch.is_autocast_enabled(input.device.type)
        ):
            return OP(input, values, *pattern, bias, kernel, *options, relu, residual)
        weight = dense_weight(values, *pattern, (*self.shape[:2], *kernel))
        output = F.conv2d(input, weight, bias, *options)
        output = output if residual is None else output + residual
        return F.relu(output) if relu else output

    def _result_dtype(self, input: Tensor) -> torch.dtype:
        """Return the dtype of what the kernels return of an input."""
        return images_dtype(input.device.type) or input.dtype

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
