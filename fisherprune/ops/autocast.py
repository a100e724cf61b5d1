"""The sparse convolution under autocast: images in bfloat16, values in float32.

Its gradients have no rule of their own: they run in the dtypes that come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherprune.ops import kernels as kernels  # registers the ops


def images_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of images under autocast on a device; None where it is off.

    Autocast to another dtype than bfloat16 leaves all in float32.
    """
    if not torch.is_autocast_enabled(device):
        return None
    asked = torch.get_autocast_dtype(device)
    return asked if asked == torch.bfloat16 else torch.float32


def _under_autocast(device: str) -> Callable[..., Tensor]:
    def run(
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
        dtype, single = images_dtype(device), torch.float32
        form = kernel, stride, padding, dilation, groups, relu
        with torch.autocast(device, enabled=False):
            return torch.ops.fisherprune.sparse_conv2d(
                _cast(input, dtype),
                _cast(values, single),
                rows,
                columns,
                _cast(bias, single),
                *form,
                _cast(residual, dtype),
            )

    return run


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """Cast what autocast casts: not float64."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


_REGISTRATIONS = torch.library.Library("fisherprune", "IMPL")
"""As long as it lives, the rule is registered."""
for _device in ("cpu", "cuda"):
    _REGISTRATIONS.impl(
        "sparse_conv2d", _under_autocast(_device), f"Autocast{_device.upper()}"
    )
