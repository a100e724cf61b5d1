"""Overlap of masks between methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherprune.report.figures.axes import draw_matrix, span
from fisherprune.report.figures.registry import TABLE_FIGURES, Figure, register
from fisherprune.report.figures.svg import WIDTH
from fisherprune.report.overlap import count_without_masks
from fisherprune.report.tables import MaskOverlap, ResultTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLUMNS = 3
"""Matrices in a row, at most."""


@register(TABLE_FIGURES, place=4)
def overlap(table: ResultTable) -> Figure | None:
    """Show the overlap of masks between methods, a matrix for each sparsity."""
    if not table.cells:
        return None
    heading, missing = "Overlap of masks", count_without_masks(table)
    if not table.overlaps:
        return Figure(heading, _none_found(table, missing))
    columns = min(COLUMNS, len(table.overlaps))
    rows = -(-len(table.overlaps) // columns)
    square = min((WIDTH - 1.6) / COLUMNS, 0.4 * len(table.methods))

    def paint(canvas: Canvas) -> None:
        canvas.set_layout_engine("compressed", wspace=0.05)  # the one for squares
        axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
        for number, (ax, found) in enumerate(zip(axes, table.overlaps, strict=False)):
            _panel(ax, table.methods, found, labelled=number % columns == 0)
        for ax in axes[len(table.overlaps) :]:
            ax.set_visible(False)

    caption = _caption(table.overlaps, missing)
    return Figure(heading, caption, _alt(table), rows * (square + 1.2), paint)


def _none_found(table: ResultTable, missing: int) -> str:
    if missing:
        return (
            f"No overlap of masks: {missing} of {len(table.runs)} runs have no "
            "masks.safetensors (deleted, or not copied)."
        )
    return (
        "No overlap of masks: no two methods have runs of the same seed and sparsity."
    )


def _caption(overlaps: Sequence[MaskOverlap], missing: int) -> str:
    n = span(n for overlap in overlaps for n in overlap.n.values())
    return (
        "Jaccard index of the masks of two methods: number of weights that both keep, "
        "divided by the number that at least one keeps. Both masks have the same seed, "
        f"and so the same initial weights; mean over seeds (n = {n}). Equal masks have "
        "1; two unrelated masks of density d have about d / (2 - d)."
        + (f" {missing} runs have no mask file any more." if missing else "")
    )


def _alt(table: ResultTable) -> str:
    return "; ".join(
        f"sparsity {found.sparsity:g}: "
        + ", ".join(f"{a} and {b} {v:.2f}" for (a, b), v in found.mean.items() if a < b)
        for found in table.overlaps
    )


def _panel(
    ax: Axes, methods: Sequence[str], found: MaskOverlap, *, labelled: bool
) -> None:
    from matplotlib.colors import Normalize

    values = [
        [1.0 if a == b else found.mean.get((a, b), math.nan) for b in methods]
        for a in methods
    ]
    labels = methods if labelled else []
    draw_matrix(ax, values, labels, "Blues", Normalize(0, 1))
    size = max(4.5, min(8, 66 / len(methods)))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if x != y and not math.isnan(value):
                color = "white" if value > 0.55 else "#222222"
                text = f"{value:.2f}".removeprefix("0")
                ax.text(x, y, text, ha="center", va="center", size=size, color=color)
    ax.set_title(f"sparsity {found.sparsity:g}")
    ax.set_aspect("equal")
    ax.set_xticks(range(len(methods)), methods, rotation=90, fontsize=7.5)
    ax.tick_params("y", labelsize=7.5)
