"""Accuracy over effective sparsity, where it is not the sparsity of the masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherprune.report.figures.axes import legend, line_with_band, number_of_runs
from fisherprune.report.figures.registry import TABLE_FIGURES, Figure, register
from fisherprune.report.figures.style import method_name, method_style
from fisherprune.report.tables import Cell, ResultTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

APART = 1.1
"""Kept weights to those on paths: from here on the two sparsities are shown apart."""


@register(TABLE_FIGURES, place=2)
def effective(table: ResultTable) -> Figure | None:
    """Show test accuracy over effective sparsity, if it is another than that asked."""
    known = {w: c for w, c in table.cells.items() if _place(c) is not None}
    if not any(_apart(cell) for cell in known.values()):
        return None

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        for method in table.methods:
            _line(ax, method, [c for (m, _), c in sorted(known.items()) if m == method])
        places = {s: -math.log10(1 - s) for s in table.sparsities if s < 1}
        ax.set_xticks(list(places.values()), [f"{s:g}" for s in places])
        ax.set_xlabel("effective sparsity")
        ax.set_ylabel("test accuracy, %")
        legend(canvas, [ax], "outside right upper")

    caption = _caption(list(known.values()), len(table.cells) - len(known))
    alt = "; ".join(
        f"{m} at {s:g}: {c.effective_sparsity:.4f}" for (m, s), c in known.items()
    )
    return Figure("Accuracy over effective sparsity", caption, alt, 4.4, paint)


def _place(cell: Cell) -> float | None:
    """Return the place on the axis; None where it is not known or nothing is left."""
    sparsity = cell.effective_sparsity
    return None if sparsity in (None, 1) else -math.log10(1 - sparsity)


def _apart(cell: Cell) -> bool:
    return any(run.kept > APART * (run.effective or 0) for run in cell.runs)


def _line(ax: Axes, method: str, cells: Sequence[Cell]) -> None:
    places = [_place(cell) or 0 for cell in cells]
    means = [cell.mean("best") for cell in cells]
    stds = [cell.std("best") or 0 for cell in cells]
    if cells:
        style, name = method_style(method), method_name(method)
        line_with_band(ax, style, name, places, means, stds)


def _caption(cells: Sequence[Cell], left_out: int) -> str:
    text = (
        "Test accuracy of the best validation weights over the mean effective sparsity "
        "of the masks, on a scale of -log10(1 - effective sparsity). The ticks are the "
        "sparsities that were asked for: a point is right of its tick where kept "
        "weights are on no path from an input to an output. Points are means "
        f"({number_of_runs(cells)}), bands one sample standard deviation to either "
        "side (none where n = 1)."
    )
    if left_out:
        text += (
            f" Not shown: {left_out} of {left_out + len(cells)} cells, whose runs have "
            "no path left, or whose effective sparsity is not known."
        )
    return text
