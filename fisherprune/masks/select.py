"""From scores to masks: how many are kept, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.densities import checked_densities, erk_densities, keep_counts
from fisherprune.masks.masks import Masks

SCOPES = ("global", "layer", "erk", "densities")
"""Where scores compete: over all, or in each layer at densities of three kinds."""


def checked_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a number in [0, 1].

    Raises:
        FisherpruneError: where it is not.
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity <= 1:
        raise FieldError("sparsity", "a number in [0, 1]", shown(sparsity))
    return float(sparsity)


def keep_count(n: int, sparsity: float) -> int:
    """Return how many of ``n`` weights are kept: ``max(1, floor((1 - sparsity) n))``.

    Exact: the sparsity is taken as the decimal number it prints as, so 0.9 of 10
    weights keeps 1. Of no weights none is kept.
    """
    share = 1 - Fraction(repr(checked_sparsity(sparsity)))
    return min(n, max(1, math.floor(share * n)))


def select_masks(
    scores: dict[str, Tensor],
    sparsity: float | Sequence[float],
    scope: str = "global",
    *,
    densities: Mapping[str, float] | None = None,
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
    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    sparsities = [checked_sparsity(s) for s in (sparsity if several else [sparsity])]
    checked_scope(scope, densities)
    tensors, total = {}, 0
    for name, s in scores.items():
        ready = s.dtype is torch.float32 and not s.requires_grad
        tensors[name] = s if ready else _checked_scores(name, s)
        total += s.numel()
    if not total:
        raise FisherpruneError("select_masks: scores must hold at least one entry")
    if scope == "global":
        keep = [keep_count(total, s) for s in sparsities]
        selected = _select_global(tensors, keep)
    else:
        counts = [_counts_by_layer(tensors, s, scope, densities) for s in sparsities]
        selected = _select_by_layer(tensors, counts)
    masks = [Masks(m) for m in selected]
    return masks if several else masks[0]


def checked_scope(scope: str, densities: Mapping[str, float] | None = None) -> str:
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


def _checked_scores(name: str, scores: Tensor) -> Tensor:
    """Return them as float32 without a gradient."""
    if scores.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise FisherpruneError(
            f"select_masks: scores of {name!r} must be float32, got {scores.dtype}"
        )
    return scores.detach().float()


def _select_global(tensors: dict[str, Tensor], keep: list[int]):
    if len({t.device for t in tensors.values()}) > 1:
        return [_select_over_devices(tensors, k) for k in keep]
    masks, _ = ops.global_topk(list(tensors.values()), keep, names=list(tensors))
    return [dict(zip(tensors, m, strict=True)) for m in masks]


def _counts_by_layer(tensors, sparsity, scope, densities) -> dict[str, int]:
    sizes = {name: t.numel() for name, t in tensors.items()}
    if scope == "layer":
        return {name: keep_count(size, sparsity) for name, size in sizes.items()}
    if scope == "erk":
        densities = erk_densities({name: t.shape for name, t in tensors.items()})
    keep = keep_count(sum(sizes.values()), sparsity)
    return keep_counts(checked_densities(densities), sizes, keep)


def _select_by_layer(tensors, counts):
    """Select in each tensor; the host waits for the device when all are under way."""
    results = {
        name: torch.ops.fisherprune.global_topk([scores], [c[name] for c in counts])
        for name, scores in tensors.items()
    }
    _refuse_nonfinite(results, tensors)
    return [
        {name: masks[i] for name, (masks, _, _) in results.items()}
        for i in range(len(counts))
    ]


def _refuse_nonfinite(results, tensors):
    """Check the results of the op ``global_topk`` on each tensor."""
    counts = [nonfinite for _, _, nonfinite in results.values()]
    ops.refuse_nonfinite(counts, list(tensors.values()), list(tensors))


def _select_over_devices(tensors: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Select over devices: their digit histograms are added, the scores stay put.

    The host waits for results when all devices have been given their work.
    """
    topk = torch.ops.fisherprune.global_topk
    _refuse_nonfinite({name: topk([s], []) for name, s in tensors.items()}, tensors)
    key, left = 0, keep
    for bits, digit in ((0, 11), (11, 11), (22, 10)):
        parts = [ops.topk_histogram([s], key, bits, digit) for s in tensors.values()]
        counts = sum(part.cpu() for part in parts)
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
