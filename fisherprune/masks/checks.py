"""Which values are masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.parameters import fitted_names
from fisherprune.shards import split_like

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Of scores; they are compared in float32."""


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


def shapes_of(scores: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """Return the shapes of scores.

    Raises:
        FisherpruneError: where they are no dict of tensors.
    """
    if not isinstance(scores, Mapping):
        wanted = "a dict of tensors by parameter name"
        raise FieldError("select_masks: scores", wanted, type(scores).__name__)
    for name, s in scores.items():
        if not isinstance(s, Tensor):
            what = f"select_masks: scores of {name!r}"
            raise FieldError(what, "a float32 tensor", type(s).__name__)
        if kind := odd_kind(s):  # a nested one has no shape
            what = f"select_masks: scores of {name!r}"
            raise FieldError(what, "a dense tensor", kind)
    return {name: s.shape for name, s in scores.items()}


def checked_scores(
    scores: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return scores of parameters in float32, without their graphs.

    Args:
        scores: by parameter name.
        shapes: that they must have, by the same names in any order.

    Raises:
        FisherpruneError: where they are no dict of dense tensors of floating-point
            numbers, or of other parameters or shapes.
    """
    _check_shapes("select_masks: scores", shapes_of(scores), shapes)
    for name, s in scores.items():
        if s.dtype not in FLOATS:
            raise FieldError(f"select_masks: scores of {name!r}", "float32", s.dtype)
    in_order = {name: scores[name] for name in shapes}
    return {
        name: s.detach().float() if s.requires_grad or s.dtype != torch.float32 else s
        for name, s in in_order.items()
    }


def checked_among(
    among: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return masks by the names of scores, each on the device of its score.

    Raises:
        FisherpruneError: where they are no masks of the same parameters and shapes.
    """
    masks = checked_masks(among, "select_masks: among")
    names = fitted_names(scores, masks)
    if names is not None and len(masks) == len(scores):
        masks = {name: masks[own] for name, own in names.items()}
    wanted = {name: s.shape for name, s in scores.items()}
    found = {name: mask.shape for name, mask in masks.items()}
    _check_shapes("select_masks: among", found, wanted)
    what = "select_masks: among of {!r}"
    return {n: split_like(masks[n], s, what.format(n)) for n, s in scores.items()}


def _check_shapes(
    what: str, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> None:
    """Refuse other parameters, or other shapes."""
    if found == wanted:
        return
    for odd in sorted(found.keys() ^ wanted.keys()):
        one = "of the parameters that are pruned"
        raise FieldError(what, one, f"{odd!r} in one of them alone")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            got = list(found[name])
            raise FieldError(f"{what} of {name!r}", f"of shape {list(shape)}", got)
