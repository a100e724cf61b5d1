"""Cross-entropy as a likelihood: of classes, at one position or at several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisherprune.statistics.likelihoods import Likelihood
from fisherprune.statistics.sample_streams import SampleStreams

CHUNK = 2**22
"""Scores of classes that are computed with in float64 at a time."""


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Cross-entropy: labels are drawn from the softmax of the scores.

    Of a sample with positions t, the loss is :math:`\sum_t a_t \sum_c w_c q_{tc}
    (-\log p_{tc})` with q the labels, smoothed. With :math:`b_t = \sum_c w_c q_{tc}`,
    its gradient is :math:`a_t (b_t p_t - w q_t)`, its Hessian :math:`a_t b_t
    (\mathrm{diag}(p_t) - p_t p_t^\top)`.

    Attributes:
        axis: of the C classes in the outputs; all others but the first are positions.
        shares: :math:`a`, ``[N, P]``; 0 where a position does not count.
        sums: :math:`b`, ``[N, P]``, of the labels that were given.
        weight: w, ``[C]``; None where all are 1.
        smoothing: of the labels, :math:`\epsilon`.
    """

    axis: int
    shares: Tensor
    sums: Tensor
    weight: Tensor | None
    smoothing: float

    @property
    def _of_samples(self) -> tuple[str, ...]:
        return ("outputs", "shares", "sums")

    @property
    def _positions(self) -> list[int]:
        """Return the positions that count in any sample."""
        return self.shares.any(0).nonzero().flatten().tolist()

    @property
    def columns(self) -> int:
        """C - 1 for each position that counts."""
        return len(self._positions) * (self.outputs.shape[self.axis] - 1)

    @cached_property
    def _scores(self) -> Tensor:
        """The scores, ``[N, P, C]``."""
        moved = self.outputs.detach().movedim(self.axis, -1)
        return moved.reshape(len(moved), -1, moved.shape[-1])

    def _like_outputs(self, found: Tensor) -> Tensor:
        """Return ``[N, P, C]`` in the outputs' shape."""
        shape = self.outputs.movedim(self.axis, -1).shape
        return found.view(shape).movedim(-1, self.axis).float()

    def roots(self) -> Iterator[Tensor]:
        """Yield the columns of one position after the other."""
        factors = (self.shares * self.sums).sqrt()
        for position in self._positions:
            for column in softmax_hessian_root(self._scores[:, position]):
                whole = torch.zeros_like(self._scores, dtype=torch.float32)
                whole[:, position] = column * factors[:, position, None]
                yield self._like_outputs(whole)

    def drawn_root(self, numbers: SampleStreams) -> Tensor:
        """Return the sums over positions of columns with signs of their own."""
        parts = []
        for scores, streams, places in self._parts(numbers):
            columns = torch.arange(scores.shape[-1] - 1, device=scores.device)
            signs = streams.signs(places.unsqueeze(-1) * len(columns) + columns)
            parts.append(signed_softmax_root(scores, signs).float())
        factors = (self.shares * self.sums).sqrt().unsqueeze(-1)
        return self._like_outputs(torch.cat(parts) * factors)

    def drawn_gradient(self, numbers: SampleStreams) -> Tensor:
        """Return the gradient for a label of each position, drawn by its place."""
        parts = [
            self._gradient(scores, streams.uniforms(places)).float()
            for scores, streams, places in self._parts(numbers)
        ]
        return self._like_outputs(torch.cat(parts) * self.shares.unsqueeze(-1))

    def _gradient(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        p = scores.double().softmax(-1)
        until = p.cumsum(-1)
        drawn = (uniforms * until[..., -1]).unsqueeze(-1)
        labels = torch.searchsorted(until, drawn, right=True).clamp_max(p.shape[-1] - 1)
        q = torch.zeros_like(p).scatter_(-1, labels, 1.0)
        q = q * (1 - self.smoothing) + self.smoothing / p.shape[-1]
        if self.weight is not None:
            q = q * self.weight
        return q.sum(-1, keepdim=True) * p - q

    def _parts(
        self, numbers: SampleStreams
    ) -> Iterator[tuple[Tensor, SampleStreams, Tensor]]:
        """Yield scores of some samples, their streams and the positions' places there.

        What does not count takes no place: so padding changes no number.
        """
        places = ((self.shares != 0).cumsum(1) - 1).clamp_min(0)
        size = max(1, CHUNK // max(1, self._scores[0].numel()))
        for i, scores in enumerate(self._scores.split(size)):
            streams = replace(numbers, first=numbers.first + i * size)
            yield scores, streams, places[i * size : (i + 1) * size]


def categorical(
    outputs: Tensor,
    labels: Tensor | None,
    losses: Callable[[], Tensor],
    *,
    axis: int = 1,
    mean: bool = True,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Categorical:
    """Return cross-entropy of checked scores and labels.

    Args:
        outputs: scores, the classes along ``axis``.
        labels: class numbers of the positions or probabilities like ``outputs``; None
            where all positions count and neither they nor the weights play a part.
        losses: as in ``Likelihood``.
        axis: of the classes.
        mean: whether a sample's loss is the mean over its positions that count.
        ignore_index: label of positions that do not count.
        weight: of the classes.
        label_smoothing: of the labels.
    """
    samples, classes = outputs.shape[0], outputs.shape[axis]
    positions = outputs.numel() // (samples * classes)
    counted = torch.ones(samples, positions, device=outputs.device)
    sums = torch.ones_like(counted)
    if labels is not None and labels.is_floating_point():
        q = labels.movedim(axis, -1).reshape(samples, positions, classes).to(counted)
        q = q * (1 - label_smoothing) + label_smoothing / classes
        sums = (q if weight is None else q * weight).sum(-1)
    elif labels is not None:
        labels = labels.reshape(counted.shape)
        if ignore_index is not None:
            counted = (labels != ignore_index).to(counted)
        if weight is not None:
            own = weight[labels.where(counted > 0, 0).long()]
            sums = own * (1 - label_smoothing) + weight.mean() * label_smoothing
    shares = counted / counted.sum(1, keepdim=True).clamp_min(1) if mean else counted
    return Categorical(outputs, losses, axis, shares, sums, weight, label_smoothing)


def softmax_hessian_root(scores: Tensor) -> Iterator[Tensor]:
    r"""Yield the columns of S with :math:`S S^\top = \mathrm{diag}(p) - p p^\top`.

    Gaussian elimination in closed form: with :math:`r_c = \sum_{j > c} p_j`, column c
    is :math:`\sqrt{p_c r_c / r_{c-1}}` times 1 at c and :math:`-p_j / r_c` at j > c.
    The last one would be zero.

    Args:
        scores: ``[N, C]``.

    Yields:
        C - 1 columns ``[N, C]``, float32.
    """
    p = scores.double().softmax(1)
    rest = p.flip(1).cumsum(1).flip(1)  # r_{c-1} at c
    for c in range(p.shape[1] - 1):
        after = rest[:, c + 1 :][:, :1]
        column = torch.zeros_like(p)
        column[:, c] = 1
        column[:, c + 1 :] = -p[:, c + 1 :] / after
        column *= (p[:, c : c + 1] * after / rest[:, c : c + 1]).sqrt()
        # What is left of the probabilities may be too small for any number.
        yield column.where(after > 0, 0).float()


def signed_softmax_root(scores: Tensor, signs: Tensor) -> Tensor:
    """Return the columns of ``softmax_hessian_root`` times signs, summed up at once.

    Args:
        scores: ``[*, C]``.
        signs: ``[*, C - 1]``.

    Returns:
        ``[*, C]``, float64.
    """
    p = scores.double().softmax(-1)
    rest = p.flip(-1).cumsum(-1).flip(-1)
    before, after = rest[..., :-1], rest[..., 1:]
    own = (p[..., :-1] * after / before).sqrt() * signs
    own = own.where(after > 0, 0)
    passed_on = (own / after).where(after > 0, 0).cumsum(-1)
    pad = torch.nn.functional.pad
    return pad(own, (0, 1)) - p * pad(passed_on, (1, 0))
