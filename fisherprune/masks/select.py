"""From scores to masks: which weights are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import overload

from torch import Tensor

from fisherprune.masks.checks import shapes_of
from fisherprune.masks.counts import Densities
from fisherprune.masks.masks import Masks
from fisherprune.masks.plan import Plan


@overload
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    *,
    densities: Densities | None = None,
    min_per_layer: int = 0,
    structure: str = "weights",
    transposed: Collection[str] = (),
    among: Mapping[str, Tensor] | None = None,
    ties: str = "error",
) -> Masks: ...


@overload
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: Sequence[float],
    scope: str = "global",
    *,
    densities: Densities | None = None,
    min_per_layer: int = 0,
    structure: str = "weights",
    transposed: Collection[str] = (),
    among: Mapping[str, Tensor] | None = None,
    ties: str = "error",
) -> list[Masks]: ...


def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | Sequence[float],
    scope: str = "global",
    *,
    densities: Densities | None = None,
    min_per_layer: int = 0,
    structure: str = "weights",
    transposed: Collection[str] = (),
    among: Mapping[str, Tensor] | None = None,
    ties: str = "error",
) -> Masks | list[Masks]:
    """Keep the largest scores: exactly ``keep_count`` entries, ties by position.

    Scope and structure are chosen apart from each other. The scope says where scores
    compete and how many weights each layer keeps; the structure, which weights are kept
    or pruned together.

    Units of several weights, channels and blocks, compete by the mean score of their
    weights. The best ones are kept while they have together at most as many weights as
    the scope says, of all or of each layer, and at least one of them is kept: in scope
    "layer" of each layer. In "N:M" only the entries of a group compete.

    Args:
        scores: float32 tensors by parameter name (float16 and bfloat16 are widened), on
            one or several devices, or in shards (DTensors) on the ranks of one mesh,
            which all make this call: then counts of scores are added up over the ranks,
            no score is sent, and the masks are in the same shards.
        sparsity: fraction removed, in [0, 1]; for a list of them all masks come from
            one selection. For structure "N:M" it must be 1 - N / M.
        scope: "global", one threshold over all tensors, or one for each tensor: at the
            same sparsity ("layer"), or at relative densities that are scaled to the
            sparsity of the whole: Erdos-Renyi-kernel ("erk", ``erk_densities``), equal
            or Erdos-Renyi-kernel ones behind a first tensor that is kept whole
            ("uniform_plus", "erk_plus"), or given ones ("densities"); see
            ``keep_counts``. For structure "N:M" it must be "global" or "layer".
        densities: by parameter name, for scope "densities" alone.
        min_per_layer: number of weights that each tensor keeps at least, or all where
            it has fewer: first its own best so many, and the others compete for what is
            left of the same total. 1 keeps layers from collapsing.
        structure: "weights", each by itself, the only one for scores in shards;
            "channels", whole output channels; "blocks:RxC", R outputs times C inputs;
            "N:M", N of each M consecutive inputs. Inputs and outputs are the dimensions
            1 and 0; each tap of a kernel has blocks and groups of its own.
        transposed: names of tensors whose dimensions 0 and 1 are inputs and outputs, as
            weights of transposed convolutions: ``transposed_names(model, parameters)``.
        among: bool tensors like the scores: what is False in them is not kept, whatever
            its score. None: all may be kept.
        ties: "error": refuse scores that do not decide, because at a threshold equal
            scores are on both sides of it, more than a twentieth of the weights kept
            and at least 10 on either, or because all that compete are equal. With
            "position" their position decides, for scores that are few different
            numbers by intention, or weights initialized to one.

    Returns:
        Masks, or a list of Masks for a list of sparsities. Of equal scores those first
        in parameter order and flat index are kept; +0 equals -0.

    Raises:
        FisherpruneError: where the sparsity, the scope, the structure or the kind of
            the scores is wrong or does not go with another, densities do not fit the
            scores or the sparsity, there are no scores, ``min_per_layer`` or a dense
            first tensor needs more than is kept, ``among`` leaves less, a score is NaN
            or infinite, or scores do not decide (names the parameter).

    Example:
        >>> import torch
        >>> scores = {"a": torch.tensor([0.3, 0.1]), "b": torch.tensor([0.2, 0.9])}
        >>> select_masks(scores, 0.5)["b"]
        tensor([False,  True])
        >>> [masks.kept() for masks in select_masks(scores, [0.25, 0.5, 0.75])]
        [3, 2, 1]
        >>> scores = {"a": torch.tensor([[4.0, 1.0, 3.0, 2.0], [5.0, 6.0, 7.0, 8.0]])}
        >>> select_masks(scores, 0.5, structure="2:4")["a"].int()
        tensor([[1, 0, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        >>> select_masks(scores, 0.5, structure="channels")["a"].int()
        tensor([[0, 0, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    plan = Plan(
        shapes_of(scores),
        scope,
        densities=densities,
        min_per_layer=min_per_layer,
        structure=structure,
        transposed=transposed,
    )
    return plan.select(scores, sparsity, ties, among)
