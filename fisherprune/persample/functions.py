"""What is known of functions by their names: which rows they read, and change."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fisherprune.persample.arguments import tensors_in

Function = Callable[..., Any]

CHOOSE_ROWS = frozenset(
    "argwhere masked_select nonzero unique unique_consecutive "
    "_pack_padded_sequence".split()
)
"""Functions the shape of whose result depends on values."""

SORT_ROWS = frozenset("msort sort topk".split())
"""Functions that order what they read by its values."""

INDEX_ROWS = frozenset(
    "__getitem__ __setitem__ embedding gather index_add index_copy index_put "
    "index_select put scatter scatter_add scatter_reduce take take_along_dim".split()
)
"""Functions that read rows, or write them, at given places."""

KEEP_ROWS = frozenset(
    "index_add index_copy index_fill index_put masked_scatter scatter scatter_add "
    "scatter_reduce".split()
)
"""Functions whose result has the shape of their first argument."""

READ_VALUES = frozenset(
    "tolist item numpy __int__ __index__ __bool__ __array__".split()
)
"""Functions that give Python numbers, which may become sizes."""

OWN_BACKWARD = frozenset("detach detach_ register_hook".split())
"""Functions by which a model changes gradients, whatever its values."""

_SHAPE, *_OTHERS = (
    getattr(Tensor, n).__get__ for n in ("shape", "device", "dtype", "ndim")
)
SIZES = frozenset({Tensor.size, Tensor.numel, Tensor.__len__, _SHAPE})
"""Functions that give sizes."""

FACTS = SIZES | {Tensor.dim, Tensor.is_floating_point, *_OTHERS}
"""Functions that read no value, and give no tensor."""


def twin_of(func: Function) -> Function | None:
    """Return what gives the result of a function that changes its first argument."""
    if func is Tensor.__setitem__:
        return with_item
    return getattr(Tensor, func.__name__[:-1], None)


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy in which the places at an index have another value."""
    changed = tensor.clone()
    changed[index] = value
    return changed


@cache
def keeps_places(name: str) -> bool:
    """Return whether values never decide where a function's result has rows."""
    special = {"__getitem__", "_pad_packed_sequence", "repeat_interleave", "where"}
    plain = name if name.startswith("__") else name.rstrip("_")
    sets = special | CHOOSE_ROWS | SORT_ROWS | INDEX_ROWS | KEEP_ROWS
    return not writes(name) and plain not in sets


def is_in_place(name: str) -> bool:
    """Return whether a function changes its first argument: ``add_``."""
    return name.endswith("_") and not name.startswith("__")


def writes(name: str) -> bool:
    """Return whether a function's result is its first argument, or like it."""
    in_place = name == "__setitem__" or name.startswith("__i")
    return in_place or is_in_place(name) or name in KEEP_ROWS


def chooses(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether values decide how many rows a result has."""
    if name == "__getitem__":
        index = tensors_in(args[1:])
        return any(t.dtype in (torch.bool, torch.uint8) for t in index)
    if name == "repeat_interleave":
        return not any(isinstance(n, int) for n in (*args[1:2], kwargs.get("repeats")))
    if name == "where":
        return len(args) + len(kwargs) == 1
    return name in CHOOSE_ROWS


@cache
def values_read(name: str) -> int | None:
    """Return how many arguments' values a function reads; None: all."""
    if name.startswith("new_") or name.endswith("_like"):
        return 0
    return 1 if name in ("to", "type_as", "expand_as") else None
