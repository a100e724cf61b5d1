"""Gradient moments as a table: one row for each layer."""

from __future__ import annotations

from torch import Tensor

from fisherprune.statistics.gradient_moments import GradientMoments


def table(moments: GradientMoments) -> str:
    """Return the weights of each layer, their mean F, the share of zeros, and its way.

    Weight and bias of a layer share a row.
    """
    layers: dict[str, list[str]] = {}
    for name in moments.sum:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    fishers = moments.fisher
    rows = [
        (layer, *_numbers([fishers[n] for n in names]), _ways(moments, names))
        for layer, names in layers.items()
    ]
    total = ("all", *_numbers(list(fishers.values())), "")
    wide = max(len("layer"), *(len(layer) for layer, *_ in rows))
    head = f"{'layer':{wide}}  {'weights':>11}  {'mean F':>9}  {'F = 0':>6}  way"
    lines = (
        f"{layer:{wide}}  {count:>11,}  {mean:9.3e}  {zero:6.1%}  {way}".rstrip()
        for layer, count, mean, zero, way in [*rows, total]
    )
    return "\n".join([head, *lines])


def _numbers(fishers: list[Tensor]) -> tuple[int, float, float]:
    """Return the number of weights, their mean F and the share where it is zero."""
    count = sum(f.numel() for f in fishers)
    total = sum(float(f.double().sum()) for f in fishers)
    zeros = sum(int((f == 0).sum()) for f in fishers)
    return count, total / max(count, 1), zeros / max(count, 1)


def _ways(moments: GradientMoments, names: list[str]) -> str:
    ways = {way: None for name in names for way in moments.paths.get(name, ())}
    return ", ".join(ways) or "none"
