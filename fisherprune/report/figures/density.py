"""Density of the masks, layer by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherprune.report.figures.axes import draw_matrix, number_of_runs
from fisherprune.report.figures.registry import TABLE_FIGURES, Figure, register
from fisherprune.report.printable import one_line
from fisherprune.report.tables import Cell, ResultTable
from fisherprune.runs.result import LayerCount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Canvas

COLLAPSED, PALE = "#d40000", "#ffe1de"
MOSTLY_DEAD = 0.5
"""Share of a layer's kept weights on paths, below which it is marked."""


@register(TABLE_FIGURES, place=3)
def density(table: ResultTable) -> Figure | None:
    """Show the density of each layer: methods by layers, a panel for each sparsity."""
    if not table.cells:
        return None
    cells, rows = list(table.cells.values()), len(table.sparsities)
    layers = [layer.name for layer in cells[0].runs[0].layers]
    height = 1.5 + rows * (0.38 + 0.19 * len(table.methods))

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        norm = _norm(cells)
        for ax, sparsity in zip(axes, table.sparsities, strict=True):
            mesh = _panel(ax, table, sparsity, layers, norm)
            ax.set_title(f"sparsity {sparsity:g}")
        ticks = [one_line(layer.removesuffix(".weight")) for layer in layers]
        size = 7.5 if len(layers) <= 60 else 4.5
        axes[-1].set_xticks(range(len(layers)), ticks, rotation=90, fontsize=size)
        bar = canvas.colorbar(
            mesh, ax=list(axes), label="density", aspect=height / 0.13, pad=0.01
        )
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.ax.yaxis.set_minor_formatter("")

    return Figure("Density per layer", _caption(cells), _alt(table), height, paint)


def _caption(cells: Sequence[Cell]) -> str:
    collapsed = sum(bool(run.collapsed) for cell in cells for run in cell.runs)
    return (
        "Share of the weights that each layer keeps (logarithmic, mean over seeds, "
        f"{number_of_runs(cells)}), layers from input to output. "
        + (
            "A red cross on pale red: the layer has collapsed, none of its weights is "
            f"kept in at least one seed ({collapsed} runs have such layers)."
            if collapsed
            else "No layer of any run has collapsed."
        )
        + (
            " A white dot: less than half of the kept weights are on a path from an "
            "input to an output."
            if any(map(_marked, (x for c in cells for r in c.runs for x in r.layers)))
            else ""
        )
    )


def _norm(cells: Sequence[Cell]) -> LogNorm:
    from matplotlib.colors import LogNorm

    shares = [
        layer.density
        for cell in cells
        for run in cell.runs
        for layer in run.layers
        if layer.kept
    ]
    return LogNorm(min(10 ** math.floor(math.log10(min(shares, default=0.1))), 0.1), 1)


def _panel(
    ax: Axes, table: ResultTable, sparsity: float, layers: Sequence[str], norm: LogNorm
) -> QuadMesh:
    cells = [table.cells.get((method, sparsity)) for method in table.methods]
    values = [[_density(cell, layer) for layer in layers] for cell in cells]
    mesh = draw_matrix(ax, values, table.methods, "viridis", norm)
    crosses = [
        (x, y)
        for y, cell in enumerate(cells)
        for x, layer in enumerate(layers)
        if _collapsed(cell, layer)
    ]
    for x, y in crosses:
        left, right, top, bottom = x - 0.5, x + 0.5, y - 0.5, y + 0.5
        corners = [left, right, right, left], [top, top, bottom, bottom]
        ax.fill(*corners, color=PALE, linewidth=0)
    dots = [
        (x, y)
        for y, cell in enumerate(cells)
        for x, layer in enumerate(layers)
        if (x, y) not in crosses and _mostly_dead(cell, layer)
    ]
    places = [x for x, _ in dots], [y for _, y in dots]
    ax.plot(*places, "o", color="white", ms=4.2, mec="#333333", mew=0.6)
    places = [x for x, _ in crosses], [y for _, y in crosses]
    ax.plot(*places, linestyle="", marker="x", color=COLLAPSED, ms=6.5, mew=2.2)
    return mesh


def _density(cell: Cell | None, layer: str) -> float:
    """Return the mean density, not a number where there is none or it is 0."""
    runs = cell.runs if cell else ()
    shares = [x.density for run in runs for x in run.layers if x.name == layer]
    return (statistics.fmean(shares) if shares else 0) or math.nan


def _mostly_dead(cell: Cell | None, layer: str) -> bool:
    """Return whether few of the kept weights are on paths, in at least one seed."""
    runs = cell.runs if cell else ()
    return any(_marked(x) for run in runs for x in run.layers if x.name == layer)


def _marked(layer: LayerCount) -> bool:
    known = layer.effective is not None
    return known and (layer.effective or 0) < MOSTLY_DEAD * layer.kept


def _collapsed(cell: Cell | None, layer: str) -> bool:
    return cell is not None and any(layer in run.collapsed for run in cell.runs)


def _alt(table: ResultTable) -> str:
    found = [
        f"{method} at {sparsity:g}: {', '.join(run.collapsed)} (seed {run.config.seed})"
        for (method, sparsity), cell in table.cells.items()
        for run in cell.runs
        if run.collapsed
    ]
    return f"Collapsed layers: {'; '.join(found) or 'none'}."
