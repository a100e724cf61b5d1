"""From scores to masks: how many are kept, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import NamedTuple, cast, overload

import numpy as np
import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.densities import checked_densities, erk_densities, keep_counts
from fisherprune.masks.masks import Masks, odd_kind
from fisherprune.parameters import fitted_names

SCOPES = ("global", "layer", "erk", "densities")
"""Where scores compete: over all, or in each layer at densities of three kinds."""

TIES = ("error", "position")
"""What to do where equal scores at the threshold decide what is kept."""

DECIDED_BY_POSITION = Fraction(1, 20)
"""Share of the kept weights that ties may decide. Scores in bfloat16, of three digits,
tie for fewer by their rounding alone; scores that can't tell weights apart, zeros of a
dead layer for instance, tie for most of them."""

FEW_TIES = 10
"""Ties that may decide in any case."""

ROUNDING = Fraction(4, 2**53)
"""How far a sparsity may be from the fraction that it means, by errors of floats."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Of scores; they are compared in float32."""

Densities = Mapping[str, float]
Shapes = Mapping[str, Sequence[int]]
"""By parameter name."""
Counts = int | dict[str, int]
"""Weights kept of all together, or of each parameter."""
Selected = dict[str, Tensor]
"""Masks by parameter name."""
Result = tuple[list[Tensor], Tensor, Tensor]
"""Of the op ``global_topk``: masks, thresholds, numbers of NaN and infinities."""


def checked_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a number in [0, 1].

    Raises:
        FisherpruneError: where it is not.
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity <= 1:
        raise FieldError("sparsity", "a number in [0, 1]", shown(sparsity))
    narrow = isinstance(sparsity, np.floating)  # 0.9 in float32 means 0.9
    return float(str(sparsity)) if narrow else float(sparsity)


def keep_count(n: int, sparsity: float) -> int:
    """Return how many of ``n`` weights are kept: ``max(1, floor((1 - sparsity) n))``.

    Exact: the sparsity is taken as the decimal number it prints as, so 0.9 of 10
    weights keeps 1. A sparsity that is less than ``4 / 2**53`` above a fraction
    ``k / n``, as sums and differences of numbers up to 1 are by rounding, means that
    fraction: ``1 - 0.7``, which is 0.30000000000000004, of 10 weights keeps 7. Of no
    weights none is kept.

    Example:
        >>> keep_count(10, 0.9), keep_count(10, 1 - 0.7), keep_count(10, 1.0)
        (1, 7, 1)
    """
    share = 1 - Fraction(repr(float(sparsity)))
    return min(n, max(1, math.floor((share + ROUNDING) * n)))


@overload
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    *,
    densities: Densities | None = None,
    ties: str = "error",
) -> Masks: ...


@overload
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: Sequence[float],
    scope: str = "global",
    *,
    densities: Densities | None = None,
    ties: str = "error",
) -> list[Masks]: ...


def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | Sequence[float],
    scope: str = "global",
    *,
    densities: Densities | None = None,
    ties: str = "error",
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
        ties: "error": refuse scores that do not decide, because at a threshold equal
            scores are on both sides of it, more than a twentieth of the weights kept
            and at least 10 on either, or because all that compete are equal. With
            "position" their position decides, for scores that are few different
            numbers by intention, or weights initialized to one.

    Returns:
        Masks, or a list of Masks for a list of sparsities. Of equal scores those first
        in parameter order and flat index are kept; +0 equals -0.

    Raises:
        FisherpruneError: where the sparsity, the scope or the kind of the scores is
            wrong, densities do not fit the scores or the sparsity, there are no scores,
            a score is NaN or infinite, or scores do not decide (names the parameter).

    Example:
        >>> import torch
        >>> scores = {"a": torch.tensor([0.3, 0.1]), "b": torch.tensor([0.2, 0.9])}
        >>> select_masks(scores, 0.5)["b"]
        tensor([False,  True])
        >>> [masks.kept() for masks in select_masks(scores, [0.25, 0.5, 0.75])]
        [3, 2, 1]
    """
    _check_scores(scores)
    checked_ties(ties)
    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    sparsities = cast("Sequence[float]", sparsity if several else [sparsity])
    shapes = {name: s.shape for name, s in scores.items()}
    counts = [kept_counts(shapes, s, scope, densities=densities) for s in sparsities]
    masks = select_counted(scores, counts, ties)
    return masks if several else masks[0]


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not isinstance(scores, Mapping):
        wanted = "a dict of tensors by parameter name"
        raise FieldError("select_masks: scores", wanted, type(scores).__name__)
    for name, s in scores.items():
        what = f"select_masks: scores of {name!r}"
        if not isinstance(s, Tensor):
            raise FieldError(what, "a float32 tensor", type(s).__name__)
        if s.dtype not in FLOATS:
            raise FieldError(what, "float32", s.dtype)
        if kind := odd_kind(s):
            raise FieldError(what, "a dense tensor", kind)


def checked_ties(ties: str) -> str:
    """Return ``ties`` if it is one of ``TIES``.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(ties, str) or ties not in TIES:
        raise FieldError("ties", f"one of {TIES}", shown(ties))
    return ties


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
    sparsity = checked_sparsity(sparsity)
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
        return keep_counts(erk_densities(shapes), sizes, keep)
    given = checked_densities(densities)
    if fit := fitted_names(given, sizes):  # one of the models was wrapped
        given = {fit[name]: density for name, density in given.items()}
    return keep_counts(given, sizes, keep)


def checked_scope(scope: str, densities: Densities | None = None) -> str:
    """Return ``scope`` if it is one of ``SCOPES``, with densities where it needs them.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(scope, str) or scope not in SCOPES:
        raise FieldError("scope", f"one of {SCOPES}", shown(scope))
    if (scope == "densities") != (densities is not None):
        wanted = f"given for scope densities, and for no other; scope is {scope}"
        raise FieldError("densities", wanted, shown(densities))
    return scope


def select_counted(
    scores: Mapping[str, Tensor], counts: Sequence[Counts], ties: str = "error"
) -> list[Masks]:
    """Keep the largest of checked scores, as many as each of ``counts`` says.

    Args:
        scores: as in ``select_masks``.
        counts: results of ``kept_counts``, all of one scope.
        ties: as in ``select_masks``.

    Raises:
        FisherpruneError: where a score is NaN or infinite, or scores do not decide.
    """
    tensors = {
        name: s.detach().float() if s.requires_grad or s.dtype != torch.float32 else s
        for name, s in scores.items()
    }
    together = [count for count in counts if isinstance(count, int)]
    by_layer = [count for count in counts if not isinstance(count, int)]
    if by_layer:
        groups = [
            _Group({name: s}, [count[name] for count in by_layer])
            for name, s in tensors.items()
        ]
    elif len({t.device for t in tensors.values()}) > 1:
        return [Masks(select_over_devices(tensors, k, ties)) for k in together]
    else:
        groups = [_Group(tensors, together)]
    results = [group.select(ties) for group in groups]
    _check(groups, results)
    parts = [group.masks(r) for group, r in zip(groups, results, strict=True)]
    return [
        Masks({name: mask for part in parts for name, mask in part[i].items()})
        for i in range(len(counts))
    ]


class _Group(NamedTuple):
    """Scores that compete, on one device."""

    tensors: dict[str, Tensor]
    keep: list[int]

    def select(self, ties: str) -> Result:
        """Call the op; where ties matter, with two ranks for each k."""
        total = sum(t.numel() for t in self.tensors.values())
        pairs = [_ranks(k, total) for k in self.keep] if ties == "error" else []
        ranks = [rank for pair in pairs for rank in pair]
        scores = list(self.tensors.values())
        return torch.ops.fisherprune.global_topk(scores, self.keep, ranks)

    def masks(self, result: Result) -> list[Selected]:
        """Return the masks of each k."""
        n = len(self.tensors)
        found = [result[0][i : i + n] for i in range(0, len(result[0]), n)]
        return [dict(zip(self.tensors, masks, strict=True)) for masks in found]

    def undecided(self, result: Result) -> Tensor:
        """Return for each k whether ties decide: whether its ranks are one number."""
        low, high = result[1][len(self.keep) :].view(-1, 2).unbind(1)
        return (low == high) & low.isfinite()


def _ranks(k: int, total: int) -> tuple[int, int]:
    """Return two ranks around the k-th largest score; ties decide where they tie.

    Then so many scores on either side of the threshold are equal, or all are. Of no
    score, or all, there is nothing to decide: rank 0 has no score.
    """
    if not 0 < k < total:
        return 0, 0
    some = max(FEW_TIES, math.floor(k * DECIDED_BY_POSITION) + 1)
    return (k - some + 1, k + some) if some <= min(k, total - k) else (1, total)


def _check(groups: list[_Group], results: list[Result]) -> None:
    """Refuse NaN, infinities and ties; the host waits for the device once."""
    n = sum(len(group.tensors) for group in groups)
    found = [nonfinite for _, _, nonfinite in results]
    found += [g.undecided(r).long() for g, r in zip(groups, results, strict=True)]
    device = next((f.device for f in found if f.is_cuda), found[0].device)
    numbers = torch.cat([f.to(device) for f in found]).tolist()
    if any(numbers[:n]):
        tensors = {name: t for group in groups for name, t in group.tensors.items()}
        ops.refuse_nonfinite(
            found[: len(groups)], list(tensors.values()), list(tensors)
        )
    if any(numbers[n:]):
        flags = iter(numbers[n:])
        ties = [
            (group.tensors, k, float(result[1][i]))
            for group, result in zip(groups, results, strict=True)
            for i, k in enumerate(group.keep[: len(group.undecided(result))])
            if next(flags)
        ]
        _refuse_ties(ties)


def _refuse_ties(ties: list[tuple[dict[str, Tensor], int, float]]) -> None:
    """Name the parameters with the most ties, of scores, keep counts and thresholds."""
    equal, places = dict[str, int](), 0
    for tensors, keep, threshold in ties:
        places += keep
        for name, s in tensors.items():
            equal[name] = int(torch.count_nonzero(s == threshold))
            places -= int(torch.count_nonzero(s > threshold))
    most = sorted((n for n in equal if equal[n]), key=lambda name: -equal[name])
    named = ", ".join(f"{name!r} ({equal[name]:,})" for name in most[:3])
    raise FisherpruneError(
        "select_masks: scores must decide which weights are kept, but "
        f"{sum(equal.values()):,} equal scores of {ties[0][2]:g} compete for "
        f"{places:,} places, most of them in {named}: such are the scores of dead "
        "layers, of layers initialized to zero and of squares below float32's range; "
        "more samples, a warm-up, another criterion or leaving these parameters out "
        'may help, and ties="position" keeps the first of them'
    )


def select_over_devices(
    tensors: dict[str, Tensor], keep: int, ties: str = "position"
) -> Selected:
    """Select over devices: their digit histograms are added, the scores stay put.

    The host waits for results when all devices have been given their work.
    """
    topk = torch.ops.fisherprune.global_topk
    nonfinite = [topk([s], [])[2] for s in tensors.values()]
    ops.refuse_nonfinite(nonfinite, list(tensors.values()), list(tensors))
    key, left = 0, keep
    for bits, digit in ((0, 11), (11, 11), (22, 10)):
        parts = [ops.topk_histogram([s], key, bits, digit) for s in tensors.values()]
        counts = torch.stack([part.cpu() for part in parts]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # entries of this digit or larger
        chosen = int((above >= left).nonzero()[-1])
        left -= int(above[chosen] - counts[chosen])
        key = key << digit | chosen
    threshold = ops.key_value(key)
    equal = {name: torch.count_nonzero(s == threshold) for name, s in tensors.items()}
    low, high = _ranks(keep, sum(s.numel() for s in tensors.values()))
    before, behind = keep - left, keep - left + sum(map(int, equal.values()))
    if ties == "error" and before < low and high <= behind:
        _refuse_ties([(tensors, keep, threshold)])
    masks = {}
    for name, scores in tensors.items():
        kept = min(int(equal[name]), left)
        masks[name] = ops.topk_masks([scores], threshold, [kept])[0]
        left -= kept
    return masks
