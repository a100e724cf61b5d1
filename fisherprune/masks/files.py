"""Files of masks: safetensors of bools, whose metadata hold the masks' order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.files import write_bytes

FORMAT = "fisherprune-masks-1"


def write_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks as ``Masks.save`` does."""
    path = _checked_path(path, "save")
    # One entry: safetensors writes several in an order that differs each time.
    order = {FORMAT: json.dumps(list(masks))}
    # Contiguous copies on the CPU: a file takes no memory that is shared.
    layout = torch.contiguous_format
    tensors = {n: m.cpu().clone(memory_format=layout) for n, m in masks.items()}
    write_bytes(path, save(tensors, metadata=order))


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read masks as ``Masks.load`` does."""
    path = _checked_path(path, "load")
    if not Path(path).is_file():
        raise FisherpruneError(f"mask file {path!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            names = _saved_order(file)
            masks = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise FisherpruneError(f"mask file {path!r} can't be read: {error}") from None
    if not names:
        raise FisherpruneError(f"{path!r} holds no masks")
    return masks


def _saved_order(file: safe_open) -> list[str]:
    """Return the names of a file's masks as they were saved; none: it holds none."""
    metadata = file.metadata() or {}
    if FORMAT in metadata:
        return json.loads(metadata[FORMAT])
    # written by another program, or before the order was
    names = list(file.keys())
    bools = all(file.get_slice(name).get_dtype() == "BOOL" for name in names)
    return names if bools else []


def _checked_path(path: str | os.PathLike[str], where: str) -> str:
    if not isinstance(path, str | os.PathLike):
        raise FieldError(f"{where}: path", "a path", shown(path))
    return os.fspath(path)
