"""Settings compared: what a warm-up, a shuffled mask, ... does to each method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherprune.report.figures.axes import (
    accuracy_line,
    legend,
    number_of_runs,
    sparsity_axis,
)
from fisherprune.report.figures.registry import COMPARISONS, Figure, register
from fisherprune.report.figures.style import DASHED, DOTTED, SOLID, LineStyle
from fisherprune.report.tables import ResultTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

COLORS = ("#0b5fa5", "#d1450b", "#00875f", "#7a1f4f", "#d98e00", "#3fa7e0", "#8a8a8a")
MARKERS = "osD^vPX"
DASHES = (SOLID, DASHED, DOTTED)
COLUMNS = 3


@register(COMPARISONS, place=1)
def settings(tables: Sequence[ResultTable]) -> Figure | None:
    """Show accuracy over sparsity: a panel for each method, a line for each setting."""
    counts = Counter(method for table in tables for method in table.methods)
    methods = [method for method, count in counts.items() if count > 1]
    if not methods:
        return None
    shown = [x for t in tables for x in t.cells.items() if x[0][0] in methods]
    sparsities = sorted({sparsity for (_, sparsity), _ in shown})
    rows = -(-len(methods) // COLUMNS)

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
        axes = list(grid.flat)
        for ax in axes[len(methods) :]:
            ax.set_visible(False)
        for ax, method in zip(axes, methods, strict=False):
            for number, table in enumerate(tables):
                if cells := table.method_cells(method):
                    style = _style(number)
                    accuracy_line(ax, style, table.label, cells, sparsities)
            sparsity_axis(ax, sparsities)
            ax.tick_params(labelbottom=True)
            ax.set_title(method)
        for row in grid:
            row[0].set_ylabel("test accuracy, %")
        legend(canvas, axes, "outside lower left")

    names = "; ".join(table.label for table in tables)
    alt = f"Methods: {', '.join(methods)}. Settings: {names}."
    height = 0.5 + 2.3 * rows + 0.2 * len(tables)
    heading = f"{tables[0].dataset}, {tables[0].model}"
    caption = _caption(number_of_runs(cell for _, cell in shown))
    return Figure(heading, caption, alt, height, paint)


def _caption(n: str) -> str:
    return (
        "Test accuracy of the best validation weights over sparsity, a panel for each "
        "method that ran in several settings, a line for each setting. Points are "
        f"means ({n}), bands one sample standard deviation to either side."
    )


def _style(number: int) -> LineStyle:
    """Return the style of a setting by its number."""
    return LineStyle(
        COLORS[number % len(COLORS)],
        MARKERS[number % len(MARKERS)],
        DASHES[number // len(COLORS) % len(DASHES)],
    )
