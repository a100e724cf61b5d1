"""Figures of masks: density layer by layer, overlap between methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fisherprune.report.figures.curves import counts
from fisherprune.report.figures.svg import WIDTH, Figure, draw
from fisherprune.report.overlap import Overlap
from fisherprune.report.tables import Cell, Group

COLLAPSED, ALARM = "#d40000", "#ffe1de"
MISSING = "#ededed"
DENSITIES, JACCARDS = "viridis", "Blues"


def density(group: Group, id: str) -> Figure:
    """Draw the density of each layer: methods by layers, a panel for each sparsity."""
    title = f"Density per layer: {group.title}"
    cells = list(group.cells.values())
    if not cells:
        return Figure(id, title, "No density per layer: nothing was pruned.", None)
    names = [layer.name for layer in cells[0].runs[0].layers]
    collapsed = sum(bool(run.collapsed) for cell in cells for run in cell.runs)
    caption = (
        "Share of the weights that each layer keeps (logarithmic, mean over seeds, "
        f"{counts(cells)}), layers from input to output. "
        + (
            "A red cross on pale red: the layer has collapsed, none of its weights is "
            f"kept in at least one seed ({collapsed} runs have such layers)."
            if collapsed
            else "No layer of any run has collapsed."
        )
    )

    height = 1.5 + len(group.sparsities) * (0.38 + 0.19 * len(group.methods))

    def paint(figure) -> None:
        rows = len(group.sparsities)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        norm = _density_norm(cells)
        for ax, sparsity in zip(axes, group.sparsities, strict=True):
            mesh = _density_panel(ax, group, sparsity, names, norm)
            ax.set_title(f"sparsity {sparsity:g}")
        ticks = [layer.removesuffix(".weight") for layer in names]
        size = 7.5 if len(names) <= 60 else 4.5
        axes[-1].set_xticks(range(len(names)), ticks, rotation=90, fontsize=size)
        bar = figure.colorbar(
            mesh, ax=list(axes), label="density", aspect=height / 0.13, pad=0.01
        )
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter("{x:g}")

    alt = _density_words(group)
    return Figure(id, title, caption, draw(id, title, alt, height, paint))


def _density_norm(cells: Sequence[Cell]):
    from matplotlib.colors import LogNorm

    shares = [
        layer.density
        for cell in cells
        for run in cell.runs
        for layer in run.layers
        if layer.kept
    ]
    return LogNorm(min(10 ** math.floor(math.log10(min(shares, default=0.1))), 0.1), 1)


def _density_panel(ax, group: Group, sparsity: float, names, norm):
    methods, x, y = group.methods, [], []
    values = []
    for row, method in enumerate(methods):
        cell = group.cells.get((method, sparsity))
        values.append([])
        for column, layer in enumerate(names):
            value, collapsed = _density(cell, layer)
            values[-1].append(value)
            if collapsed:
                x.append(column)
                y.append(row)
    mesh = _mesh(ax, values, DENSITIES, norm)
    for column, row in zip(x, y, strict=True):
        ax.fill([column - 0.5, column + 0.5, column + 0.5, column - 0.5],
                [row - 0.5, row - 0.5, row + 0.5, row + 0.5],
                color=ALARM, linewidth=0)  # fmt: skip
    ax.plot(x, y, linestyle="", marker="x", color=COLLAPSED, ms=6.5, mew=2.2)
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    return mesh


def _density(cell: Cell | None, layer: str) -> tuple[float, bool]:
    """Return the mean density, NaN where there is none, and whether one is 0."""
    runs = cell.runs if cell else ()
    found = [x for run in runs for x in run.layers if x.name == layer]
    if not found:
        return math.nan, False
    mean = statistics.fmean(x.density for x in found)
    return mean or math.nan, any(x.kept == 0 for x in found)


def _mesh(ax, values, cmap: str, norm):
    """Draw a matrix as vector squares; grey where a value is missing."""
    import matplotlib
    import numpy as np

    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    colors = matplotlib.colormaps[cmap].with_extremes(bad=MISSING)
    matrix = np.ma.masked_invalid(np.array(values, dtype=float))
    return ax.pcolormesh(matrix_edges(matrix.shape[1]), matrix_edges(len(matrix)),
                         matrix, cmap=colors, norm=norm, edgecolors="white",
                         linewidth=0.6)  # fmt: skip


def matrix_edges(count: int) -> list[float]:
    """Return the borders of cells whose centres are 0, 1, ..."""
    return [place - 0.5 for place in range(count + 1)]


def _density_words(group: Group) -> str:
    found = [
        f"{method} at {sparsity:g}: {', '.join(run.collapsed)} (seed {run.config.seed})"
        for (method, sparsity), cell in group.cells.items()
        for run in cell.runs
        if run.collapsed
    ]
    return f"Collapsed layers: {'; '.join(found) or 'none'}."


def jaccard(group: Group, found: Sequence[Overlap], missing: int, id: str) -> Figure:
    """Draw the overlap of masks between methods, a matrix for each sparsity."""
    title = f"Overlap of masks: {group.title}"
    if not found:
        return Figure(id, title, _no_overlap(group, missing), None)
    numbers = sorted({n for overlap in found for n in overlap.n.values()})
    span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    caption = (
        "Jaccard index of the masks of two methods: weights that both keep, divided by "
        "weights that at least one keeps; of equal seeds, so of the same initial "
        f"weights; mean over seeds (n = {span}). 1 are equal masks; two unrelated "
        "masks of density d have about d / (2 - d)."
        + (f" {missing} runs have no mask file any more." if missing else "")
    )
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    square = min((WIDTH - 1.6) / 3, 0.4 * len(group.methods))

    def paint(figure) -> None:
        from matplotlib.colors import Normalize

        figure.set_layout_engine("compressed", wspace=0.05)  # the one for squares
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, ax in enumerate(grid.flat):
            if number >= len(found):
                ax.set_visible(False)
                continue
            first = number % columns == 0
            _jaccard_panel(ax, group.methods, found[number], Normalize(0, 1), first)

    alt = "; ".join(
        f"sparsity {o.sparsity:g}: "
        + ", ".join(f"{a} and {b} {v:.2f}" for (a, b), v in o.mean.items() if a < b)
        for o in found
    )
    height = rows * (square + 1.2)
    return Figure(id, title, caption, draw(id, title, alt, height, paint))


def _no_overlap(group: Group, missing: int) -> str:
    if missing:
        return (
            f"No overlap of masks: {missing} of {len(group.runs)} runs have no "
            "masks.safetensors (cleaned up, or not copied along)."
        )
    return "No overlap of masks: no two methods have runs of one seed and sparsity."


def _jaccard_panel(ax, methods, overlap: Overlap, norm, labelled: bool) -> None:
    values = [
        [1.0 if a == b else overlap.mean.get((a, b), math.nan) for b in methods]
        for a in methods
    ]
    _mesh(ax, values, JACCARDS, norm)
    size = max(4.5, min(8, 66 / len(methods)))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if x != y and not math.isnan(value):
                color = "white" if value > 0.55 else "#222222"
                text = f"{value:.2f}".removeprefix("0")
                ax.text(x, y, text, ha="center", va="center", fontsize=size,
                        color=color)  # fmt: skip
    ax.set_title(f"sparsity {overlap.sparsity:g}")
    ax.set_aspect("equal")
    ax.set_xticks(range(len(methods)), methods, rotation=90, fontsize=7.5)
    ax.set_yticks(range(len(methods)), methods if labelled else [], fontsize=7.5)
    ax.set_ylim(len(methods) - 0.5, -0.5)
