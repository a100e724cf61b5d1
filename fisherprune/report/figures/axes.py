"""What several figures draw alike: lines with bands, matrices, axes and legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from fisherprune.report.figures.style import LineStyle
from fisherprune.report.tables import Cell

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Canvas

BAND = 0.16
"""Opacity of bands."""
MISSING = "#ededed"
"""Color of a square without a number."""


def number_of_runs(cells: Iterable[Cell]) -> str:
    """Return how many runs each point stands for: ``n = 3`` or ``n = 1 to 3``."""
    return f"n = {span(cell.n for cell in cells)}"


def span(numbers: Iterable[int]) -> str:
    """Return ``3`` or ``1 to 3``."""
    several = sorted(set(numbers))
    if len(several) == 1:
        return f"{several[0]}"
    return f"{several[0]} to {several[-1]}"


def legend(
    canvas: Canvas,
    axes: Sequence[Axes],
    place: Literal["outside right upper", "outside lower left"],
) -> None:
    """Add a legend beside the axes, each label once."""
    chosen: dict[str, Artist] = {}
    for ax in axes:
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            chosen.setdefault(text, handle)
    canvas.legend(list(chosen.values()), list(chosen), loc=place, handlelength=3.2)


def line_with_band(
    ax: Axes,
    style: LineStyle,
    label: str,
    x: Sequence[float],
    means: Sequence[float],
    stds: Sequence[float],
    *,
    width: float | None = None,
    markers: bool = True,
) -> None:
    """Draw means, and a band of one standard deviation to either side.

    On a logarithmic axis the band must not reach 0: where it would, it ends at the
    mean.
    """
    ax.plot(
        x,
        means,
        color=style.color,
        linestyle=style.dashes,
        linewidth=width,
        marker=style.marker if markers else "",
        markersize=style.marker_size,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
    )
    if any(stds):
        low = [m - s if m > s else m for m, s in zip(means, stds, strict=True)]
        high = [m + s for m, s in zip(means, stds, strict=True)]
        ax.fill_between(x, low, high, color=style.color, alpha=BAND, linewidth=0)


def accuracy_line(
    ax: Axes,
    style: LineStyle,
    label: str,
    cells: Mapping[float, Cell],
    sparsities: Sequence[float],
) -> None:
    """Draw cells by sparsity, on the axis of all the sparsities: means and bands."""
    own, places = sorted(cells), sparsity_places(sparsities)
    means = [cells[s].mean("best") for s in own]
    stds = [cells[s].std("best") or 0 for s in own]
    line_with_band(ax, style, label, [places[s] for s in own], means, stds)


def sparsity_axis(ax: Axes, sparsities: Sequence[float]) -> None:
    """Label the places of the sparsities."""
    places = sparsity_places(sparsities)
    ax.set_xticks(list(places.values()), [f"{s:g}" for s in places])
    ax.set_xlabel("sparsity")


def sparsity_places(sparsities: Sequence[float]) -> dict[float, float]:
    """Return where sparsities lie on an axis: -log10(1 - s), 1 right of all others."""
    places = {s: -math.log10(1 - s) for s in sparsities if s < 1}
    if 1 in sparsities:
        places[1.0] = max(places.values(), default=0) + 0.5
    return places


def draw_matrix(
    ax: Axes,
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    colors: str,
    norm: Normalize,
) -> QuadMesh:
    """Draw a matrix as vector squares, its first row on top.

    Args:
        ax: where to draw.
        values: rows of numbers; a square is grey where one is not a number.
        labels: of the rows.
        colors: name of a color map.
        norm: of the color map.
    """
    import matplotlib
    import numpy as np

    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    matrix = np.ma.masked_invalid(np.array(values, dtype=float))
    rows, columns = matrix.shape
    mesh = ax.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        matrix,
        cmap=matplotlib.colormaps[colors].with_extremes(bad=MISSING),
        norm=norm,
        edgecolors="white",
        linewidth=0.6,
    )
    ax.set_yticks(range(rows), labels)
    ax.set_ylim(rows - 0.5, -0.5)
    return mesh
