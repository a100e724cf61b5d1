"""Which values are masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError, shown


def checked_masks(masks: object, where: str) -> dict[str, Tensor]:
    """Return ``masks`` as a dict if they are dense bool tensors by parameter name.

    Raises:
        FisherpruneError: where they are not, or there is none; the message begins with
            ``where``.
    """
    if not isinstance(masks, Mapping):
        raise FisherpruneError(
            f"{where}: masks must map parameter names to bool tensors, got "
            f"{shown(masks)}"
        )
    if not masks:
        raise FisherpruneError(f"{where}: masks must hold at least one mask, got none")
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise FisherpruneError(f"{where}: names must be strings, got {shown(name)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else shown(mask)
            raise FieldError(f"{where}: mask of {name!r}", "a bool tensor", got)
        if kind := odd_kind(mask):
            raise FieldError(f"{where}: mask of {name!r}", "a dense tensor", kind)
    return dict(masks)


def odd_kind(tensor: Tensor) -> str:
    """Return what kind of tensor it is where it is not a dense one with values."""
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout != torch.strided:
        return f"a sparse one ({tensor.layout})"
    return "one on the meta device" if tensor.is_meta else ""
