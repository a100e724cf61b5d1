"""Embeddings, and bags of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherprune.persample.arguments import Arguments, with_tensors
from fisherprune.persample.contributions import Contribution
from fisherprune.persample.lookups import Lookups
from fisherprune.persample.meeting import (
    Meeting,
    multiplied_out,
    register_gradients,
    register_rule,
)


@register_gradients(F.embedding)
def embedding(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Lookups] | None:
    """Return the gradients of the rows looked up."""
    if scale_grad_by_freq:
        return None
    indices = input.flatten(1) if input.dim() > 1 else input.unsqueeze(1)
    if padding_idx is not None:
        indices = indices.masked_fill(indices == padding_idx % len(weight), -1)
    grads = grad.reshape(*indices.shape, grad.shape[-1])
    return {"weight": Lookups.by_samples(indices, grads, tuple(weight.shape))}


@dataclass(frozen=True)
class _Bags:
    """The lookups of a call of ``embedding_bag``, but for padding.

    Attributes:
        bag: ``[R]``, of each lookup.
        indices: ``[R]``.
        weights: ``[R]``, its factor; None: 1.
        count: of bags.
    """

    bag: Tensor
    indices: Tensor
    weights: Tensor | None
    count: int

    @staticmethod
    def of(
        input: Tensor, offsets: Tensor | None, weights: Tensor | None, has_end: bool
    ) -> _Bags:
        """Return those of bags of one size, or of offsets at which each begins."""
        place = torch.arange(input.numel(), device=input.device)
        flat = input.flatten(), None if weights is None else weights.flatten()
        if offsets is None:
            count, size = input.shape
            return _Bags(place // max(1, size), *flat, count)
        bag = torch.searchsorted(offsets.to(place), place, right=True) - 1
        count = len(offsets) - has_end
        return _Bags(bag, *flat, count)._where(bag < count)

    def without(self, index: int) -> _Bags:
        """Return the other lookups than those of an index."""
        return self._where(self.indices != index)

    def sizes(self) -> Tensor:
        """Return the number of lookups of each bag, ``[count]``."""
        return torch.bincount(self.bag, minlength=self.count)

    def different(self, rows: int) -> _Bags:
        """Return the different lookups of each bag, of a weight of so many rows."""
        keys = (self.bag * rows + self.indices).unique()
        return _Bags(keys // rows, keys % rows, None, self.count)

    def _where(self, chosen: Tensor) -> _Bags:
        weights = None if self.weights is None else self.weights[chosen]
        found = replace(self, bag=self.bag[chosen], weights=weights)
        return replace(found, indices=self.indices[chosen])


@register_rule(F.embedding_bag)
def embedding_bag(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """Give each row of a bag the bag's gradient, or its share; of max, the winners."""
    args, kwargs = with_tensors(meeting.arguments, iter(tensors))
    found = _bag_lookups(grad, *args, **kwargs)
    weight = next((i for i in meeting.shared if found and tensors[i] is found[0]), None)
    if (
        found is None
        or weight is None
        or meeting.shared != (weight,)
        or meeting.output.axis
    ):
        return multiplied_out(meeting, grad, tensors)
    lookups = found[1]
    samples = meeting.sample_of_rows(grad[:, 0])
    return {weight: lookups.of_rows(samples, meeting.samples)}


def _bag_lookups(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Lookups] | None:
    """Return the weight and its lookups, of bags as samples."""
    if scale_grad_by_freq:
        return None
    bags = _Bags.of(input, offsets, per_sample_weights, include_last_offset)
    if padding_idx is not None:
        bags = bags.without(padding_idx % len(weight))
    if mode == "max":
        starts = torch.searchsorted(bags.bag, torch.arange(bags.count).to(bags.bag))
        winners = torch.embedding_bag(weight, bags.indices, starts, False, 2)[3]
        bags = bags.different(len(weight))
        is_winner = winners[bags.bag] == bags.indices.unsqueeze(1)
        grads = torch.where(is_winner, grad[bags.bag], 0)
    elif mode == "mean":
        grads = (grad / bags.sizes().clamp_min(1).unsqueeze(1))[bags.bag]
    else:
        grads = grad[bags.bag]
        if bags.weights is not None:
            grads = grads * bags.weights.unsqueeze(1)
    return weight, Lookups(
        bags.bag, bags.indices, grads, tuple(weight.shape), bags.count
    )


@register_rule(Tensor.__getitem__)
def indexed(
    meeting: Meeting, grad: Tensor, tensors: Sequence[Tensor]
) -> dict[int, Contribution]:
    """``weight[index]``: an embedding, of rows of any shape."""
    if not is_lookup(meeting.arguments, tensors, meeting.shared):
        return multiplied_out(meeting, grad, tensors)
    weight, index = tensors
    shape, count = tuple(weight.shape), meeting.samples
    samples = meeting.sample_of_rows(index)
    grads = grad.reshape(index.numel(), weight[:1].numel())
    index = index.flatten().remainder(len(weight))  # they may count from the end
    return {0: Lookups(samples, index, grads, shape, count)}


def is_lookup(
    arguments: Arguments, tensors: Sequence[Tensor], shared: Collection[int]
) -> bool:
    """Return whether ``__getitem__`` looks rows of a shared tensor up."""
    return (
        len(tensors) == 2
        and set(shared) == {0}
        and isinstance(arguments[0][1], Tensor)
        and tensors[1].dtype in (torch.int64, torch.int32)
        and tensors[1].dim() > 0
    )
