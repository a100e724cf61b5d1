"""Random numbers of samples: each sample has a stream of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class SampleStreams:
    """Random numbers of the samples of a batch, alike on every device.

    A number depends on the seed, on the sample's place among all samples, on the draw
    and on the number's place in the sample: so it does not depend on how samples are
    cut into batches. It is SplitMix64's (Steele et al. 2014), of a state that counts.

    Attributes:
        seed: of all samples, as of ``stream_seed``.
        first: number of samples before the batch.
        draw: number of the draw.
    """

    seed: int
    first: int = 0
    draw: int = 0

    def bits(self, places: Tensor) -> Tensor:
        """Return random int64 for places ``[N, *]`` in the samples' streams."""
        n = places.shape[0]
        samples = torch.arange(self.first, self.first + n, device=places.device)
        draw = torch.tensor(self.draw, device=places.device)
        streams = _mixed(_mixed(self.seed + _STEP * samples) + _STEP * draw)
        shape = n, *(1 for _ in places.shape[1:])
        return _mixed(streams.view(shape) + _STEP * places)

    def uniforms(self, places: Tensor) -> Tensor:
        """Return numbers that are uniform in (0, 1), float64."""
        high = (self.bits(places) >> 12) & (2**52 - 1)
        return (high.double() + 0.5) * 2.0**-52

    def signs(self, places: Tensor) -> Tensor:
        """Return 1 or -1, each as often, float32."""
        return 1.0 - 2.0 * (self.bits(places) < 0).float()


def _mixed(state: Tensor) -> Tensor:
    for shift, factor in _FACTORS:
        state = (state ^ _shifted(state, shift)) * factor
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Return the 64 bits shifted to the right, zeros first."""
    return (state >> by) & (2 ** (64 - by) - 1)
