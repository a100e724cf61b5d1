"""Densities of layers: the share of the weights that each of them keeps."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.masks import Masks


def read_densities(path: str | Path) -> dict[str, float]:
    """Read densities by parameter name.

    Args:
        path: a JSON file ``{"PARAMETER": NUMBER, ...}``, or masks that ``Masks.save``
            wrote (``*.safetensors``), whose densities are taken.

    Raises:
        FisherpruneError: where the file is missing or holds neither.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Masks.load(path).density()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FisherpruneError(
            f"densities must be in a file that can be read, got {path}: "
            f"{error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FisherpruneError(f"densities file {path} is no JSON: {error}") from None
    return checked_densities(content, f"densities of {path}")


def checked_densities(content: object, name: str = "densities") -> dict[str, float]:
    """Return ``content`` if it maps parameter names to finite numbers, 0 or more.

    Raises:
        FisherpruneError: where it does not; the message begins with ``name``.
    """
    if not isinstance(content, Mapping) or not content:
        raise FieldError(name, "numbers by parameter name", shown(content))
    for key, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= sys.float_info.max:
            got = f"{shown(value)} for {shown(key)}"
            raise FieldError(name, "finite numbers of at least 0", got)
    return {str(key): float(value) for key, value in content.items()}


def erk_densities(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return relative Erdos-Renyi-kernel densities: sum of dimensions / their product.

    For a Conv2d weight (out + in + height + width) / (out in height width), for a
    Linear one (out + in) / (out in): narrow layers stay denser, and a vector is as
    dense as can be. Mocanu et al. 2018; with the kernel, Evci et al. 2020, RigL,
    arXiv 1911.11134.

    Args:
        shapes: of the parameters, by name; an empty one has density 0.
    """
    densities = {}
    for name, shape in shapes.items():
        dims = tuple(shape) or (1,)
        size = math.prod(dims)
        densities[name] = sum(dims) / size if size else 0.0
    return densities


def keep_counts(
    densities: Mapping[str, float],
    sizes: Mapping[str, int],
    keep: int,
    least: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return how many weights each layer keeps, ``keep`` in all, by relative densities.

    All densities are scaled by one factor. Where that makes a density larger than 1, it
    becomes 1 and the others are scaled further; where it keeps less than ``least`` of a
    layer, that becomes what the layer keeps. The counts are rounded by largest
    remainder, ties by order, so that they sum to ``keep``. The arithmetic is exact.

    Args:
        densities: numbers of at least 0, by parameter name; 0 keeps none, or ``least``.
        sizes: number of weights of each layer, by parameter name.
        keep: weights kept in all.
        least: number of weights that each layer keeps at least, at most its size.

    Raises:
        FisherpruneError: where densities and sizes name other parameters, the layers
            whose density is not 0 have less than ``keep`` weights, or ``least`` sums to
            more.
    """
    _check_names(densities, sizes)
    least = least or {}
    check_least(least, keep)
    weights = {n: Fraction(d) * sizes[n] for n, d in densities.items() if d > 0}
    lows = {n: least.get(n, 0) for n in sizes}
    bounds = {n: (low, sizes[n] if n in weights else low) for n, low in lows.items()}
    most = sum(high for _, high in bounds.values())
    if keep > most:
        raise FisherpruneError(
            f"densities: at most {most} weights can be kept, the density of the others "
            f"is 0, but the sparsity asks for {keep}"
        )
    shares = {n: Fraction(low) for n, low in lows.items()}
    return _rounded(shares | _scaled(weights, bounds, keep), keep)


def check_least(least: Mapping[str, int], keep: int) -> None:
    """Refuse that layers must keep more weights together than are kept in all."""
    if sum(least.values()) > keep:
        raise FisherpruneError(
            f"min_per_layer: the layers must keep {sum(least.values())} weights "
            f"together, but the sparsity leaves {keep}"
        )


def first_dense(
    scope: str,
    densities: Mapping[str, float],
    sizes: Mapping[str, int],
    keep: int,
    least: Mapping[str, int],
) -> dict[str, int]:
    """Return ``keep_counts`` where the first layer that has weights keeps all of them.

    Raises:
        FisherpruneError: where it has more than ``keep``; the message names ``scope``.
    """
    first = next(name for name, size in sizes.items() if size)
    if sizes[first] > keep:
        raise FisherpruneError(
            f"scope {scope} keeps all {sizes[first]} weights of the first layer, "
            f"{first!r}, but the sparsity leaves {keep}"
        )
    others = {name: size for name, size in sizes.items() if name != first}
    relative = {name: densities[name] for name in others}
    lows = {name: least[name] for name in others}
    counts = keep_counts(relative, others, keep - sizes[first], lows)
    return {name: counts.get(name, size) for name, size in sizes.items()}


def _scaled(
    weights: Mapping[str, Fraction], bounds: Mapping[str, tuple[int, int]], keep: int
) -> dict[str, Fraction]:
    """Return ``weights`` times one factor, within bounds, so that all sum to ``keep``.

    What one factor takes over its bound, or below it, is fixed there, the larger of the
    two sums of violations first: each step has the others make up for it.
    """
    shares, open_ = dict[str, Fraction](), {n: w for n, w in weights.items() if w}
    left = keep - sum(low for n, (low, _) in bounds.items() if n not in open_)
    while open_:
        factor = left / sum(open_.values(), Fraction())
        over = {n: w * factor - bounds[n][1] for n, w in open_.items()}
        under = {n: bounds[n][0] - w * factor for n, w in open_.items()}
        over = {n: by for n, by in over.items() if by >= 0}
        under = {n: by for n, by in under.items() if by > 0}
        if not over and not under:
            return shares | {n: w * factor for n, w in open_.items()}
        low = sum(under.values()) > sum(over.values())
        for name in under if low else over:
            shares[name] = Fraction(bounds[name][0 if low else 1])
            left -= int(shares[name])
            del open_[name]
    return shares


def _check_names(densities: Mapping[str, float], sizes: Mapping[str, int]) -> None:
    missing = [name for name in sizes if name not in densities]
    unknown = [name for name in densities if name not in sizes]
    for what, names in (("lack", missing), ("name unknown", unknown)):
        if names:
            raise FisherpruneError(
                "densities must be of the pruned parameters, they "
                f"{what} {', '.join(map(repr, names))}"
            )


def _rounded(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Round numbers to integers that sum to ``total``, by largest remainder."""
    counts = {name: math.floor(share) for name, share in shares.items()}
    missing = total - sum(counts.values())
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_remainder[:missing]:  # a stable sort: ties by order
        counts[name] += 1
    return counts
