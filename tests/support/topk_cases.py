"""Named score lists that are hard for a global top-k: plain numpy data, no fixtures.

``VALUES[name](rng, n)`` gives n float32 values, ``cut`` makes a list of arrays of them
(odd shapes, empty ones in between), ``keeps`` the k worth asking for, and
``case(name, n)`` all of it at once, by torch's random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Rng = np.random.Generator
Array = np.ndarray

TINY = np.uint32(1).view(np.float32)  # the smallest denormal
HUGE = np.finfo(np.float32).max


def _floats(bits: Array) -> Array:
    return bits.astype(np.uint32).view(np.float32)


def _few_distinct(rng: Rng, n: int) -> Array:
    return rng.choice(np.array([-2, -1, 0, 0.5, 1, 3], np.float32), n)


def _ulps_from(start: float) -> Callable[[Rng, int], Array]:
    """Distinct neighbours on both sides of ``start``, shuffled."""

    def values(rng: Rng, n: int) -> Array:
        base = int(np.float32(start).view(np.uint32))
        return _floats(base - n // 2 + rng.permutation(n).astype(np.int64))

    return values


def _denormals(rng: Rng, n: int) -> Array:
    return _floats(rng.integers(0, 1 << 12, n) | rng.integers(0, 2, n) << 31)


def _signed_zeros(rng: Rng, n: int) -> Array:
    return _floats(rng.integers(0, 2, n) << 31)


def _zeros_and_tiny(rng: Rng, n: int) -> Array:
    return rng.choice(np.array([0.0, -0.0, TINY, -TINY], np.float32), n)


def _every_bit_pattern(rng: Rng, n: int) -> Array:
    values = _floats(rng.integers(0, 1 << 32, n, dtype=np.uint64))
    return np.where(np.isfinite(values), values, np.float32(0))


def _extremes(rng: Rng, n: int) -> Array:
    return rng.choice(np.array([HUGE, -HUGE, 1, -1, TINY, 0], np.float32), n)


def _one_in_a_thousand(rng: Rng, n: int) -> Array:
    """All zero but for few entries: most of any k are ties."""
    return np.where(rng.random(n) < 1e-3, rng.random(n), 0).astype(np.float32)


def _periodic(period: int) -> Callable[[Rng, int], Array]:
    """Large only at every ``period``-th place: misleads a sample of that stride."""

    def values(rng: Rng, n: int) -> Array:
        large = np.arange(n) % period == 0
        return (rng.random(n) + 1000 * large).astype(np.float32)

    return values


def _two_scales(rng: Rng, n: int) -> Array:
    """First half near 1e-20, second near 1e20: tensors of very different magnitude."""
    return (rng.random(n) * np.where(np.arange(n) < n // 2, 1e-20, 1e20)).astype("f4")


def _late_ties(rng: Rng, n: int) -> Array:
    """Entries that equal each other only from the middle on, among smaller ones."""
    return np.where(np.arange(n) < n // 2, -rng.random(n), 7).astype(np.float32)


VALUES: dict[str, Callable[[Rng, int], Array]] = {
    "gaussian": lambda rng, n: rng.standard_normal(n, np.float32),
    "squared": lambda rng, n: rng.standard_normal(n, np.float32) ** 4,
    "log_normal": lambda rng, n: rng.lognormal(0, 12, n).clip(0, HUGE).astype("f4"),
    "ascending": lambda rng, n: np.arange(n, dtype=np.float32),
    "descending": lambda rng, n: -np.arange(n, dtype=np.float32),
    "all_equal": lambda rng, n: np.full(n, 0.1, np.float32),
    "all_negative_equal": lambda rng, n: np.full(n, -0.1, np.float32),
    "few_distinct": _few_distinct,
    "ulps_from_one": _ulps_from(1.0),
    "ulps_from_minus_two": _ulps_from(-2.0),
    "denormals": _denormals,
    "signed_zeros": _signed_zeros,
    "zeros_and_tiny": _zeros_and_tiny,
    "every_bit_pattern": _every_bit_pattern,
    "extremes": _extremes,
    "one_in_a_thousand": _one_in_a_thousand,
    "periodic_64": _periodic(64),
    "periodic_171": _periodic(171),
    "two_scales": _two_scales,
    "late_ties": _late_ties,
}


def cut(values: Array, rng: Rng) -> list[Array]:
    """Cut into contiguous arrays of uneven sizes, some empty, some with two axes."""
    n = len(values)
    at = rng.integers(0, n + 1, 5)
    parts = np.split(values, np.sort([0, *at, at[0], n]))  # three or more are empty
    return [p.reshape(2, -1) if len(p) % 2 == 0 and len(p) else p for p in parts]


def keeps(n: int) -> list[int]:
    """Return the borders, a few percent, and repetitions, in no order."""
    wanted = [n // 10, 0, 1, n, n // 2, n - 1, n // 100, n // 10, n // 10 + 1]
    return [min(max(k, 0), n) for k in wanted]


def case(name: str, n: int) -> tuple[list[Array], list[int]]:
    """Return the score arrays of a named case of n entries and the k to ask for."""
    seed = int(torch.randint(2**31, ()))
    rng = np.random.default_rng([seed, n, *name.encode()])
    with np.errstate(over="ignore"):
        values = VALUES[name](rng, n)
    return cut(np.ascontiguousarray(values, np.float32), rng), keeps(n)
