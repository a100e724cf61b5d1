"""Accuracy and loss over the epochs of training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherprune.report.figures.axes import legend, line_with_band, number_of_runs
from fisherprune.report.figures.registry import TABLE_FIGURES, Figure, register
from fisherprune.report.figures.style import method_name, method_style
from fisherprune.report.tables import DENSE, ResultTable
from fisherprune.runs.reader import FinishedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


@register(TABLE_FIGURES, place=5)
def curves(table: ResultTable) -> Figure:
    """Show validation accuracy and training loss over the epochs."""
    heading = "Training curves"
    if not any(run.epochs for run in table.runs):
        reason = "No training curves: the runs have no metrics.csv with epochs."
        return Figure(heading, reason)
    rows = table.sparsities or (0.0,)

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(len(rows), 2, sharex=True, sharey="col", squeeze=False)
        for sparsity, (left, right) in zip(rows, grid, strict=True):
            for method in table.all_methods:
                runs = _runs(table, method, sparsity)
                _curve(left, method, runs, "validation_accuracy", 100)
                _curve(right, method, runs, "train_loss", 1)
            left.set_title(f"sparsity {sparsity:g}" if table.sparsities else "dense")
            left.set_ylabel("validation accuracy, %")
            right.set_ylabel("training loss")
        _scale(list(grid[-1]), list(grid[:, 1]))
        legend(canvas, list(grid.flat), "outside right upper")

    alt = f"Curves of {', '.join(map(method_name, table.all_methods))}."
    height = 0.5 + 2.1 * len(rows)
    return Figure(heading, _caption(table), alt, height, paint)


def _caption(table: ResultTable) -> str:
    dashed = " Dashed: dense baseline, the same in every row." if table.dense else ""
    return (
        "Left: accuracy on the validation images; right: loss on the training images "
        "(logarithmic); over the epochs after the mask, a row for each sparsity. Lines "
        f"are means ({number_of_runs(table.all_cells)}), bands one sample standard "
        f"deviation to either side.{dashed}"
    )


def _scale(last_row: Sequence[Axes], losses: Sequence[Axes]) -> None:
    """Make the axes of losses logarithmic, and those of epochs count in integers."""
    losses[0].set_yscale("log")
    for ax in losses:
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(lambda x, _: _two_or_five(x))
    for ax in last_row:
        ax.locator_params(axis="x", integer=True)
        ax.set_xlabel("epoch")


def _two_or_five(value: float) -> str:
    """Label 2 and 5 between the powers of ten."""
    text = f"{value:g}"
    return text if text.strip("0.") in ("2", "5") else ""


def _runs(table: ResultTable, method: str, sparsity: float) -> Sequence[FinishedRun]:
    cell = table.dense if method == DENSE else table.cells.get((method, sparsity))
    return cell.runs if cell else ()


def _curve(
    ax: Axes, method: str, runs: Sequence[FinishedRun], column: str, factor: float
) -> None:
    """Draw mean and band over the runs that have a value in an epoch."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for row in run.epochs:
            epoch, value = row["epoch"], row[column]
            if epoch is not None and value is not None and math.isfinite(value):
                values.setdefault(epoch, []).append(factor * value)
    if not values:
        return
    epochs = sorted(values)
    means = [statistics.fmean(values[e]) for e in epochs]
    stds = [statistics.stdev(values[e]) if len(values[e]) > 1 else 0 for e in epochs]
    line_with_band(
        ax,
        method_style(method),
        method_name(method),
        epochs,
        means,
        stds,
        width=1.2,
        markers=len(epochs) == 1,
    )
