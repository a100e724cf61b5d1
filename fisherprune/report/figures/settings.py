"""Settings compared: what a warm-up, a shuffled mask, ... does to each method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fisherprune.report.figures.curves import (
    accuracy_axis,
    accuracy_line,
    counts,
    legend,
)
from fisherprune.report.figures.style import Look
from fisherprune.report.figures.svg import Figure, draw
from fisherprune.report.tables import Group

COLORS = ("#0b5fa5", "#d1450b", "#00875f", "#7a1f4f", "#d98e00", "#3fa7e0", "#8a8a8a")
MARKERS = "osD^vPX"
LINES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)))
COLUMNS = 3


def comparable(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups of each dataset and model that share a method with another."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        found.setdefault((group.dataset, group.model), []).append(group)
    return [several for several in found.values() if common_methods(several)]


def common_methods(groups: Sequence[Group]) -> list[str]:
    """Return the methods with runs in at least two groups."""
    counts = Counter(method for group in groups for method in group.methods)
    return [method for method, count in counts.items() if count > 1]


def compare(groups: Sequence[Group], id: str) -> Figure:
    """Draw accuracy over sparsity: a panel for each method, a line for each setting.

    Args:
        groups: settings of one dataset and model.
        id: of the figure in the page.
    """
    title = f"Settings compared: {groups[0].dataset}, {groups[0].model}"
    methods = common_methods(groups)
    shown = [x for group in groups for x in group.cells.items() if x[0][0] in methods]
    sparsities = sorted({sparsity for (_, sparsity), _ in shown})
    caption = (
        "Test accuracy of the best validation weights over sparsity, a panel for each "
        "method that ran in several settings, a line for each setting. Points are "
        f"means ({counts(cell for _, cell in shown)}), bands one sample standard "
        "deviation to either side."
    )
    rows = -(-len(methods) // COLUMNS)

    def paint(figure) -> None:
        grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
        for ax in list(grid.flat)[len(methods) :]:
            ax.set_visible(False)
        for ax, method in zip(grid.flat, methods, strict=False):
            for number, group in enumerate(groups):
                _setting(ax, group, number, method, sparsities)
            accuracy_axis(ax, sparsities)
            ax.tick_params(labelbottom=True)
            ax.set_title(method)
        for row in grid:
            row[0].set_ylabel("test accuracy, %")
        legend(figure, grid.flat[0], list(grid.flat)[1:], place="outside lower left")

    alt = f"Methods: {', '.join(methods)}. Settings: {_names(groups)}."
    height = 0.5 + 2.3 * rows + 0.2 * len(groups)
    return Figure(id, title, caption, draw(id, title, alt, height, paint))


def _names(groups: Sequence[Group]) -> str:
    return "; ".join(group.label for group in groups)


def _setting(ax, group: Group, number: int, method: str, sparsities) -> None:
    points = {s: cell for (m, s), cell in group.cells.items() if m == method}
    if points:
        look = Look(
            COLORS[number % len(COLORS)],
            MARKERS[number % len(MARKERS)],
            LINES[number // len(COLORS) % len(LINES)],
        )
        accuracy_line(ax, look, group.label, points, sparsities)
