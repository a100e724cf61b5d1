"""From scores to masks: how many are kept, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import cast, overload

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.densities import checked_densities, erk_densities, keep_counts
from fisherprune.masks.masks import Masks

SCOPES = ("global", "layer", "erk", "densities")
"""Where scores compete: over all, or in each layer at densities of three kinds."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Of scores; they are compared in float32."""

Densities = Mapping[str, float]
Shapes = Mapping[str, Sequence[int]]
"""By parameter name."""
Counts = int | dict[str, int]
"""Weights kept of all together, or of each parameter."""
Selected = dict[str, Tensor]
"""Masks by parameter name."""
Results = dict[str, tuple[list[Tensor], Tensor, Tensor]]
"""Results of the op ``global_topk`` on each tensor, by name."""


def checked_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a number in [0, 1].

    Raises:
        FisherpruneError: where it is not.
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity <= 1:
        raise FieldError("sparsity", "a number in [0, 1]", repr(sparsity))
    return float(sparsity)


def keep_count(n: int, sparsity: float) -> int:
    """Return how many of ``n`` weights are kept: ``max(1, floor((1 - sparsity) n))``.

    Exact: the sparsity is taken as the decimal number it prints as, so 0.9 of 10
    weights keeps 1. Of no weights none is kept.
    """
    share = 1 - Fraction(repr(float(sparsity)))
    return min(n, max(1, math.floor(share * n)))


@overload
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    *,
    densities: Densities | None = None,
) -> Masks: ...


@overload
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: Sequence[float],
    scope: str = "global",
    *,
    densities: Densities | None = None,
) -> list[Masks]: ...


def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | Sequence[float],
    scope: str = "global",
    *,
    densities: Densities | None = None,
) -> Masks | list[Masks]:
    """Keep the largest scores: exactly ``keep_count`` entries, ties by position.

    Args:
        scores: float32 tensors by parameter name (float16 and bfloat16 are widened), on
            one or several devices.
        sparsity: fraction removed, in [0, 1]; for a list of them all masks come from
            one selection.
        scope: "global", one threshold over all tensors, or one for each tensor: at the
            same sparsity ("layer"), or at relative densities that are scaled to the
            sparsity of the whole: Erdos-Renyi-kernel ("erk", ``erk_densities``) or
            given ones ("densities"); see ``keep_counts``.
        densities: by parameter name, for scope "densities" alone.

    Returns:
        Masks, or a list of Masks for a list of sparsities. Of equal scores those first
        in parameter order and flat index are kept; +0 equals -0.

    Raises:
        FisherpruneError: where the sparsity, the scope or the scores' dtype is wrong,
            densities do not fit the scores or the sparsity, there are no scores, or a
            score is NaN or infinite (names the parameter).
    """
    for name, s in scores.items():
        if s.dtype not in FLOATS:
            what = f"select_masks: scores of {name!r}"
            raise FieldError(what, "float32", s.dtype)
    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    sparsities = cast("Sequence[float]", sparsity if several else [sparsity])
    shapes = {name: s.shape for name, s in scores.items()}
    counts = [kept_counts(shapes, s, scope, densities=densities) for s in sparsities]
    masks = select_counted(scores, counts)
    return masks if several else masks[0]


def kept_counts(
    shapes: Shapes,
    sparsity: float,
    scope: str = "global",
    *,
    densities: Densities | None = None,
) -> Counts:
    """Return how many weights ``select_masks`` would keep; no score is needed.

    So mistakes are found before scores are made.

    Args:
        shapes: of the parameters, by name.
        sparsity: fraction removed, in [0, 1].
        scope: as in ``select_masks``.
        densities: as in ``select_masks``.

    Returns:
        One number for scope "global", or one for each parameter.

    Raises:
        FisherpruneError: for any reason of ``select_masks`` but the scores.
    """
    checked_sparsity(sparsity)
    checked_scope(scope, densities)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if not any(sizes.values()):
        raise FisherpruneError("select_masks: scores must hold at least one entry")
    keep = keep_count(sum(sizes.values()), sparsity)
    if scope == "global":
        return keep
    if scope == "layer":
        return {name: keep_count(size, sparsity) for name, size in sizes.items()}
    if scope == "erk":
        densities = erk_densities(shapes)
    return keep_counts(checked_densities(densities), sizes, keep)


def checked_scope(scope: str, densities: Densities | None = None) -> str:
    """Return ``scope`` if it is one of ``SCOPES``, with densities where it needs them.

    Raises:
        FisherpruneError: where it is not.
    """
    if scope not in SCOPES:
        raise FieldError("scope", f"one of {SCOPES}", repr(scope))
    if (scope == "densities") != (densities is not None):
        wanted = f"given for scope densities, and for no other; scope is {scope}"
        raise FieldError("densities", wanted, shown(densities))
    return scope


def select_counted(scores: Mapping[str, Tensor], counts: list[Counts]) -> list[Masks]:
    """Keep the largest of checked scores, as many as each of ``counts`` says.

    Args:
        scores: as in ``select_masks``.
        counts: results of ``kept_counts``, all of one scope.

    Raises:
        FisherpruneError: where a score is NaN or infinite.
    """
    tensors = {
        name: s.detach().float() if s.requires_grad or s.dtype != torch.float32 else s
        for name, s in scores.items()
    }
    by_layer = [count for count in counts if not isinstance(count, int)]
    if by_layer:
        selected = _select_by_layer(tensors, by_layer)
    else:
        selected = _select_global(tensors, [k for k in counts if isinstance(k, int)])
    return [Masks(masks) for masks in selected]


def _select_global(tensors: dict[str, Tensor], keep: list[int]) -> list[Selected]:
    if len({t.device for t in tensors.values()}) > 1:
        return [_select_over_devices(tensors, k) for k in keep]
    masks, _ = ops.global_topk(list(tensors.values()), keep, names=list(tensors))
    return [dict(zip(tensors, m, strict=True)) for m in masks]


def _select_by_layer(
    tensors: dict[str, Tensor], counts: list[dict[str, int]]
) -> list[Selected]:
    """Select in each tensor; the host waits for the device when all are under way."""
    results: Results = {
        name: torch.ops.fisherprune.global_topk([scores], [c[name] for c in counts])
        for name, scores in tensors.items()
    }
    _refuse_nonfinite(results, tensors)
    return [
        {name: masks[i] for name, (masks, _, _) in results.items()}
        for i in range(len(counts))
    ]


def _refuse_nonfinite(results: Results, tensors: dict[str, Tensor]) -> None:
    """Check the results of the op ``global_topk`` on each tensor."""
    counts = [nonfinite for _, _, nonfinite in results.values()]
    ops.refuse_nonfinite(counts, list(tensors.values()), list(tensors))


def _select_over_devices(tensors: dict[str, Tensor], keep: int) -> Selected:
    """Select over devices: their digit histograms are added, the scores stay put.

    The host waits for results when all devices have been given their work.
    """
    topk = torch.ops.fisherprune.global_topk
    _refuse_nonfinite({name: topk([s], []) for name, s in tensors.items()}, tensors)
    key, left = 0, keep
    for bits, digit in ((0, 11), (11, 11), (22, 10)):
        parts = [ops.topk_histogram([s], key, bits, digit) for s in tensors.values()]
        counts = torch.stack([part.cpu() for part in parts]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # entries of this digit or larger
        chosen = int((above >= left).nonzero()[-1])
        left -= int(above[chosen] - counts[chosen])
        key = key << digit | chosen
    threshold = ops.key_value(key)
    equal = {name: (s == threshold).sum() for name, s in tensors.items()}
    masks = {}
    for name, scores in tensors.items():
        ties = min(int(equal[name]), left)
        masks[name] = ops.topk_masks([scores], threshold, [ties])[0]
        left -= ties
    return masks
