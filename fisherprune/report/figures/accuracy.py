"""Accuracy over sparsity, beside published numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fisherprune.report.figures.axes import (
    BAND,
    accuracy_line,
    legend,
    line_with_band,
    number_of_runs,
    sparsity_axis,
    sparsity_places,
)
from fisherprune.report.figures.registry import TABLE_FIGURES, Figure, register
from fisherprune.report.figures.style import method_name, method_style
from fisherprune.report.published import PublishedTable
from fisherprune.report.tables import DENSE, Cell, ResultTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


@register(TABLE_FIGURES, place=1)
def accuracy(table: ResultTable) -> Figure | None:
    """Show test accuracy over sparsity, the published numbers in a second panel."""
    if not table.cells:
        return None
    published = table.published

    def paint(canvas: Canvas) -> None:
        columns = 2 if published else 1
        axes = canvas.subplots(1, columns, sharey=True, squeeze=False)[0]
        _results(axes[0], table)
        if published:
            axes[0].set_title("these runs")
            axes[1].set_title("published")
            _published(axes[1], published)
        legend(canvas, axes, "outside right upper")

    return Figure("Accuracy over sparsity", _caption(table), _alt(table), 4.8, paint)


def _caption(table: ResultTable) -> str:
    text = (
        "Test accuracy of the best validation weights over sparsity, on a scale of "
        "-log10(1 - sparsity): equal steps to the right divide the number of kept "
        "weights by equal factors. Points are means "
        f"({number_of_runs(table.cells.values())}), bands one sample standard "
        "deviation to either side (none where n = 1)."
    )
    if table.dense:
        text += f" Dashed line: dense baseline (n = {table.dense.n})."
    if published := table.published:
        text += f" Right: {published.source}, n = {published.n}."
    return text


def _results(ax: Axes, table: ResultTable) -> None:
    sparsity_axis(ax, table.sparsities)
    for method in table.methods:
        style, name = method_style(method), method_name(method)
        cells = table.method_cells(method)
        accuracy_line(ax, style, name, cells, table.sparsities)
    if table.dense:
        _dense_line(ax, table.dense)
    ax.set_ylabel("test accuracy, %")


def _dense_line(ax: Axes, dense: Cell) -> None:
    mean, std = dense.mean("best"), dense.std("best") or 0
    style = method_style(DENSE)
    ax.axhline(mean, color=style.color, linestyle=style.dashes, lw=1.2, label="dense")
    ax.axhspan(mean - std, mean + std, color=style.color, alpha=BAND / 2, linewidth=0)


def _published(ax: Axes, published: PublishedTable) -> None:
    sparsities = sorted({s for _, s in published.cells})
    sparsity_axis(ax, sparsities)
    x = list(sparsity_places(sparsities).values())
    for method in dict.fromkeys(m for m, _ in published.cells):
        pairs = [published.cells[method, s] for s in sparsities]
        means, stds = zip(*pairs, strict=True)
        line_with_band(ax, method_style(method), method_name(method), x, means, stds)


def _alt(table: ResultTable) -> str:
    lines = [
        f"sparsity {s:g}: "
        + ", ".join(
            f"{m} {table.cells[m, s].mean('best'):.2f} %"
            for m in table.methods
            if (m, s) in table.cells
        )
        for s in table.sparsities
    ]
    if table.dense:
        lines.append(f"dense: {table.dense.mean('best'):.2f} %")
    return "; ".join(lines)
