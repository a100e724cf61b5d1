"""From scores to masks: which weights are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast, overload

import torch
from torch import Tensor

from fisherprune import ops
from fisherprune.errors import FieldError
from fisherprune.masks.checks import odd_kind
from fisherprune.masks.counts import Counts, Densities, kept_counts
from fisherprune.masks.devices import read_together, select_over_devices
from fisherprune.masks.masks import Masks
from fisherprune.masks.ties import checked_ties, refuse_ties, tie_ranks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Of scores; they are compared in float32."""


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
        found = [
            _Found.among({name: s}, [count[name] for count in by_layer], ties)
            for name, s in tensors.items()
        ]
    elif len({t.device for t in tensors.values()}) > 1:
        return [Masks(select_over_devices(tensors, k, ties)) for k in together]
    else:
        found = [_Found.among(tensors, together, ties)]
    _check(found)
    return [
        Masks({name: mask for one in found for name, mask in one.masks_of(i).items()})
        for i in range(len(counts))
    ]


class _Found(NamedTuple):
    """What the op ``global_topk`` found in scores that compete, on one device."""

    tensors: dict[str, Tensor]
    keep: list[int]
    masks: list[Tensor]
    thresholds: Tensor
    nonfinite: Tensor

    @classmethod
    def among(cls, tensors: dict[str, Tensor], keep: list[int], ties: str) -> _Found:
        """Call the op; where ties matter, with two ranks for each k."""
        total = sum(t.numel() for t in tensors.values())
        pairs = [tie_ranks(k, total) for k in keep] if ties == "error" else []
        ranks = [rank for pair in pairs for rank in pair]
        topk = torch.ops.fisherprune.global_topk
        return cls(tensors, keep, *topk(list(tensors.values()), keep, ranks))

    def masks_of(self, i: int) -> dict[str, Tensor]:
        """Return the masks of the i-th k."""
        n = len(self.tensors)
        return dict(zip(self.tensors, self.masks[i * n : (i + 1) * n], strict=True))

    def undecided(self) -> Tensor:
        """Return for each k whether ties decide: whether its ranks are one number."""
        low, high = self.thresholds[len(self.keep) :].view(-1, 2).unbind(1)
        return (low == high) & low.isfinite()


def _check(found: list[_Found]) -> None:
    """Refuse NaN, infinities and ties; the host waits for the devices once."""
    numbers = read_together(
        [*(one.nonfinite for one in found), *(one.undecided() for one in found)]
    )
    tensors = {name: t for one in found for name, t in one.tensors.items()}
    flags = numbers[len(tensors) :]  # for each of found, of all its k
    ops.refuse_nonfinite(numbers[: len(tensors)], list(tensors.values()), list(tensors))
    for i in range(len(flags) // len(found)):
        flags_of = flags[i :: len(found[0].keep)]
        tied = [one for one, flag in zip(found, flags_of, strict=True) if flag]
        if tied:
            refuse_ties(
                [(one.tensors, one.keep[i], float(one.thresholds[i])) for one in tied]
            )
