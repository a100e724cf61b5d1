"""The record of first and second moments, kept as sums: added up, saved, read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fisherprune.errors import FieldError, shown
from fisherprune.shards import check_whole, split_like, whole_of
from fisherprune.statistics.accumulators import Sums
from fisherprune.statistics.moments_files import (
    SHARD_BYTES,
    read_moments,
    write_moments,
)
from fisherprune.statistics.scale import shifted

WHAT = "GradientMoments: the right side of +"
"""What errors call it."""

FACTS = ("samples", "groups", "group_size", "exponent", "labels", "paths")
"""What files of moments hold beside tensors and provenance."""


@dataclass(frozen=True, eq=False)
class GradientMoments:
    r"""First and second moments of the group gradients :math:`G_1 ... G_J`.

    Kept as sums and counts, so moments of different samples add up: ``a + b`` holds
    those of the samples of both, and shards of the data may be passed over one by one.

    Attributes:
        sum: :math:`\sum_j G_j` by parameter name, float32; times ``2**exponent``.
        sum_sq: :math:`\sum_j G_j \odot G_j`, by parameter name, float32; times
            ``4**exponent``.
        samples: number of samples seen.
        groups: J, the number of groups.
        group_size: samples averaged in one group.
        paths: by parameter name, in which ways its gradients were found: the names of
            functions for whose calls there is a rule ("linear", "conv2d", ...), "vmap"
            where a function without one was differentiated for each sample, "loop"
            where the whole model was; none where no loss depends on it.
        exponent: 0 but where float32 could not hold the squares as they are.
        labels: of ``sum_sq``, "given" or "sampled"; those of ``sum`` are given.
        provenance: what was said of these samples where they were saved, one record for
            each ``save`` that was given one; those of both sides of ``+``.
    """

    sum: Sums
    sum_sq: Sums
    samples: int
    groups: int
    group_size: int
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    exponent: int = 0
    labels: str = "given"
    provenance: tuple[Mapping[str, object], ...] = ()

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        r""":math:`m = \frac1J \sum_j G_j` by parameter name, float32."""
        return shifted(_divided(self.sum, self.groups), -self.exponent)

    @cached_property
    def fisher(self) -> dict[str, Tensor]:
        r""":math:`F = \frac1J \sum_j G_j \odot G_j`, the mean squared gradients.

        By parameter name, float32; the empirical Fisher diagonal where the group size
        is 1. It is 0 where float32 can't hold it.
        """
        return shifted(_divided(self.sum_sq, self.groups), -2 * self.exponent)

    def __add__(self, other: GradientMoments) -> GradientMoments:
        """Return the moments of the samples of both, on the devices of the left side.

        Groups stay what they are: a partial last group of the left side counts as one.
        So the sum is that of a single pass where the left side's samples are a multiple
        of the group size.

        Raises:
            FisherpruneError: where group sizes or labels differ, or names or shapes of
                the parameters.
        """
        if not isinstance(other, GradientMoments):
            return NotImplemented
        ours, theirs = (
            {"group_size": m.group_size, "labels": m.labels}
            | {n: [*s.shape] for n, s in m.sum.items()}
            for m in (self, other)
        )
        for what in ours | theirs:
            if ours.get(what) != theirs.get(what):
                wanted = f"{ours.get(what)} on both sides of +"
                raise FieldError(f"GradientMoments: {what}", wanted, theirs.get(what))
        exponent = min(self.exponent, other.exponent)  # with which both are in range
        (sums, squares), (more_sums, more_squares) = (
            (shifted(m.sum, by), shifted(m.sum_sq, 2 * by))
            for m in (self, other)
            for by in [exponent - m.exponent]
        )
        return GradientMoments(
            {n: t + split_like(more_sums[n], t, WHAT) for n, t in sums.items()},
            {n: t + split_like(more_squares[n], t, WHAT) for n, t in squares.items()},
            self.samples + other.samples,
            self.groups + other.groups,
            self.group_size,
            {
                n: tuple(sorted({*self.paths.get(n, ()), *other.paths.get(n, ())}))
                for n in self.sum
            },
            exponent,
            self.labels,
            (*self.provenance, *other.provenance),
        )

    def whole(self) -> GradientMoments:
        """Return moments that are in shards as whole ones, on each rank.

        All ranks must ask for them. Others are returned as they are.
        """
        sums, squares = (
            {name: whole_of(t) for name, t in named.items()}
            for named in (self.sum, self.sum_sq)
        )
        return replace(self, sum=sums, sum_sq=squares)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        provenance: Mapping[str, object] | None = None,
        max_shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the moments to a safetensors file, whole or not at all.

        Its tensors are ``sum/NAME`` and ``sum_sq/NAME``; counts, ways and versions are
        in its metadata. Where it would be larger than ``max_shard_bytes`` there are
        several files instead, and ``PATH.index.json`` in Hugging Face's layout, which
        is written last. Moments that were at ``path`` before are replaced. Tensors of
        the CPU are not copied, so memory-mapped ones need not fit into memory.

        Args:
            path: of the file, ``NAME.safetensors`` say.
            provenance: which model, data and loss they are of: anything that JSON can
                hold, by name.
            max_shard_bytes: bytes of tensors in one file; a larger tensor has a file
                alone.

        Raises:
            FisherpruneError: where an argument can't be used, an index that is not of
                moments is in the way, or moments are in shards: then all ranks ask for
                ``whole()``, and one saves these.
            OSError: where the folder is missing, not writable or full.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
            >>> batches = [(torch.randn(16, 5), torch.randint(3, (16,)))]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = f"{folder}/moments.safetensors"
            ...     gradient_moments(net, batches).save(path, provenance={"data": "A"})
            ...     found = GradientMoments.load(path)
            >>> found.samples, found.provenance
            (16, ({'data': 'A'},))
        """
        if not isinstance(provenance, Mapping | None):
            wanted = "a dict of what JSON can hold"
            raise FieldError("save: provenance", wanted, shown(provenance))
        check_whole("save: moments", "moments.whole().save(path) on one rank", self.sum)
        records = [*self.provenance, *([provenance] if provenance else [])]
        facts = {name: getattr(self, name) for name in FACTS}
        facts["provenance"] = [dict(record) for record in records]
        parts = {"sum": self.sum, "sum_sq": self.sum_sq}
        write_moments(path, parts, facts, max_shard_bytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradientMoments:
        """Read what ``save`` wrote, onto the CPU; every bit is checked.

        Args:
            path: as it was saved, or of the index of several files.

        Raises:
            FisherpruneError: where a file is missing, damaged or holds something else.
        """
        parts, facts = read_moments(path)
        sums = parts["sum"], parts["sum_sq"]
        found = cls(*sums, **{name: facts[name] for name in FACTS})
        paths = {name: tuple(ways) for name, ways in found.paths.items()}
        return replace(found, paths=paths, provenance=tuple(facts["provenance"]))


@torch.inference_mode(False)  # autograd may save what is not made in inference mode
def _divided(sums: Sums, groups: int) -> dict[str, Tensor]:
    return {name: sum / groups for name, sum in sums.items()}
