"""Figures of accuracy, training and time; those of masks are in ``maskfigures``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from fisherprune.report.figures.style import Look, look, name
from fisherprune.report.figures.svg import Figure, draw
from fisherprune.report.tables import DENSE, Cell, Group
from fisherprune.runs.reader import Run
from fisherprune.runs.words import duration

BAND = 0.16
"""Opacity of bands."""


def counts(cells: Iterable[Cell]) -> str:
    """Return how many runs each point stands for: ``n = 3`` or ``n = 1 to 3``."""
    numbers = sorted({cell.n for cell in cells})
    if len(numbers) == 1:
        return f"n = {numbers[0]}"
    return f"n = {numbers[0]} to {numbers[-1]}"


def positions(sparsities: Sequence[float]) -> dict[float, float]:
    """Return where sparsities lie on an axis: -log10(1 - s), 1 right of all others."""
    places = {s: -math.log10(1 - s) for s in sparsities if s < 1}
    if 1 in sparsities:
        places[1.0] = max(places.values(), default=0) + 0.5
    return places


def legend(
    figure, ax, others: Sequence = (), *, place: str = "outside right upper"
) -> None:
    """Add a legend beside the axes, each label once."""
    chosen: dict[str, object] = {}
    for each in (ax, *others):
        for handle, text in zip(*each.get_legend_handles_labels(), strict=True):
            chosen.setdefault(text, handle)
    figure.legend(chosen.values(), chosen, loc=place, handlelength=3.2)


def accuracy(group: Group, id: str) -> Figure:
    """Draw test accuracy over sparsity, the published numbers in a second panel."""
    theirs = group.published
    title = f"Accuracy over sparsity: {group.title}"
    caption = (
        "Test accuracy of the best validation weights over sparsity, on a scale of "
        "-log10(1 - sparsity): each step to the right of equal length divides the "
        "number of weights kept by the same factor. Points are means "
        f"({counts(group.cells.values())}), bands one sample standard deviation to "
        "either side (none where n = 1)."
    )
    if group.dense:
        caption += f" Dashed line: dense baseline (n = {group.dense.n})."
    if theirs:
        caption += f" Right: {theirs.source}, n = {len(theirs.seeds)}."

    def paint(figure) -> None:
        axes = figure.subplots(1, 2 if theirs else 1, sharey=True, squeeze=False)[0]
        accuracy_axis(axes[0], group.sparsities)
        for method in group.methods:
            points = {s: c for (m, s), c in group.cells.items() if m == method}
            accuracy_line(axes[0], look(method), name(method), points, group.sparsities)
        if group.dense:
            _dense_line(axes[0], group.dense)
        axes[0].set_ylabel("test accuracy, %")
        if theirs:
            axes[0].set_title("these runs")
            axes[1].set_title("published")
            _published(axes[1], theirs)
        legend(figure, axes[0], axes[1:])

    alt = _accuracy_words(group)
    return Figure(id, title, caption, draw(id, title, alt, 4.8, paint))


def accuracy_axis(ax, sparsities: Sequence[float]) -> None:
    """Label the axis of ``positions`` with the sparsities."""
    places = positions(sparsities)
    ax.set_xticks(list(places.values()), [f"{s:g}" for s in places])
    ax.set_xlabel("sparsity")


def accuracy_line(ax, style: Look, label: str, points, sparsities) -> None:
    """Draw cells by sparsity, on the axis of all the sparsities: means and bands."""
    own = sorted(points)
    means = [points[s].mean("best") for s in own]
    stds = [points[s].std("best") or 0 for s in own]
    places = positions(sparsities)
    _line(ax, style, label, [places[s] for s in own], means, stds)


def _line(ax, style: Look, label: str, x, means, stds) -> None:
    ax.plot(
        x,
        means,
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=style.size,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
    )
    low = [m - s for m, s in zip(means, stds, strict=True)]
    high = [m + s for m, s in zip(means, stds, strict=True)]
    ax.fill_between(x, low, high, color=style.color, alpha=BAND, linewidth=0)


def _dense_line(ax, dense: Cell) -> None:
    mean, std = dense.mean("best"), dense.std("best") or 0
    style = look(DENSE)
    ax.axhline(mean, color=style.color, linestyle=style.line, lw=1.2, label="dense")
    ax.axhspan(mean - std, mean + std, color=style.color, alpha=BAND / 2, linewidth=0)


def _published(ax, theirs) -> None:
    sparsities = sorted({s for _, s in theirs.cells})
    accuracy_axis(ax, sparsities)
    for method in dict.fromkeys(m for m, _ in theirs.cells):
        pairs = [theirs.cells[method, s] for s in sparsities]
        means, stds = zip(*pairs, strict=True)
        x = positions(sparsities).values()
        _line(ax, look(method), name(method), list(x), means, stds)


def _accuracy_words(group: Group) -> str:
    lines = [
        f"sparsity {s:g}: "
        + ", ".join(
            f"{m} {group.cells[m, s].mean('best'):.2f} %"
            for m in group.methods
            if (m, s) in group.cells
        )
        for s in group.sparsities
    ]
    if group.dense:
        lines.append(f"dense: {group.dense.mean('best'):.2f} %")
    return "; ".join(lines)


def curves(group: Group, id: str) -> Figure:
    """Draw validation accuracy and training loss over the epochs."""
    title = f"Training curves: {group.title}"
    if not any(run.epochs for run in group.runs):
        reason = "No training curves: the runs have no metrics.csv with epochs."
        return Figure(id, title, reason, None)
    rows = group.sparsities or (0.0,)
    caption = (
        "Left: accuracy on the validation images; right: loss on the training images "
        "(logarithmic); over the epochs after the mask, a row for each sparsity. Lines "
        f"are means ({counts(_all_cells(group))}), bands one sample standard deviation "
        "to either side."
        + (" Dashed: dense baseline, the same in every row." if group.dense else "")
    )

    def paint(figure) -> None:
        grid = figure.subplots(len(rows), 2, sharex=True, sharey="col", squeeze=False)
        for sparsity, (left, right) in zip(rows, grid, strict=True):
            for method in group.all_methods:
                runs = _curve_runs(group, method, sparsity)
                _curve(left, method, runs, "validation_accuracy", 100)
                _curve(right, method, runs, "train_loss", 1)
            left.set_title(f"sparsity {sparsity:g}" if group.sparsities else "dense")
            left.set_ylabel("validation accuracy, %")
            right.set_ylabel("training loss")
        grid[0][1].set_yscale("log")
        for ax in grid[:, 1]:
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(lambda x, _: _two_or_five(x))
        for ax in grid[-1]:
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_xlabel("epoch")
        legend(figure, grid[0][0], [ax for row in grid for ax in row])

    alt = f"Curves of {', '.join(map(name, group.all_methods))}."
    height = 0.5 + 2.1 * len(rows)
    return Figure(id, title, caption, draw(id, title, alt, height, paint))


def _two_or_five(value: float) -> str:
    """Label 2 and 5 between the powers of ten."""
    text = f"{value:g}"
    return text if text.strip("0.") in ("2", "5") else ""


def _all_cells(group: Group) -> list[Cell]:
    return [*group.cells.values(), *([group.dense] if group.dense else [])]


def _curve_runs(group: Group, method: str, sparsity: float) -> Sequence[Run]:
    if method == DENSE:
        return group.dense.runs
    cell = group.cells.get((method, sparsity))
    return cell.runs if cell else ()


def _curve(ax, method: str, runs: Sequence[Run], column: str, factor: float) -> None:
    """Draw mean and band over the runs that have a value in an epoch."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for row in run.epochs:
            if row[column] is not None and math.isfinite(row[column]):
                values.setdefault(row["epoch"], []).append(factor * row[column])
    if not values:
        return
    epochs, style = sorted(values), look(method)
    means = [statistics.fmean(values[e]) for e in epochs]
    stds = [statistics.stdev(values[e]) if len(values[e]) > 1 else 0 for e in epochs]
    marker = style.marker if len(epochs) == 1 else ""
    ax.plot(
        epochs,
        means,
        color=style.color,
        linestyle=style.line,
        marker=marker,
        linewidth=1.2,
        label=name(method),
    )
    if any(stds):
        low = [m - s if m > s else m for m, s in zip(means, stds, strict=True)]
        high = [m + s for m, s in zip(means, stds, strict=True)]
        ax.fill_between(epochs, low, high, color=style.color, alpha=BAND, linewidth=0)


def time(group: Group, id: str) -> Figure:
    """Draw the seconds of scoring and training per run, by method and device."""
    title = f"Time per run: {group.title}"
    devices = sorted({str(run.environment.get("device")) for run in group.runs})
    caption = (
        "Wall time of one run: making the mask (left) and training (right). Bars are "
        "means over all sparsities and seeds, dots single runs. Only times on one "
        f"device compare: {', '.join(devices)}."
    )
    if cached := sum(run.reused is not None for run in group.runs):
        caption += (
            f" {cached} of {len(group.runs)} runs took their statistics from the cache "
            "(hollow dots): what these had cost when they were computed is added."
        )
    methods = group.all_methods

    def paint(figure) -> None:
        grid = figure.subplots(len(devices), 2, squeeze=False)
        for device, axes in zip(devices, grid, strict=True):
            for ax, phase in zip(axes, ("scoring", "training"), strict=True):
                shown = [m for m in methods if m != DENSE or phase == "training"]
                _bars(ax, group, shown, device, phase)
                label = {"scoring": "making the mask", "training": "training"}[phase]
                ax.set_title(f"{label}, {device}" if len(devices) > 1 else label)
                ax.set_xlabel("seconds")

    height = len(devices) * (1.0 + 0.26 * len(methods))
    alt = "; ".join(_time_words(group, method) for method in methods)
    return Figure(id, title, caption, draw(id, title, alt, height, paint))


def _bars(ax, group: Group, methods, device: str, phase: str) -> None:
    ax.grid(axis="y", visible=False)
    ax.set_yticks(range(len(methods)), [name(m) for m in methods])
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.margins(x=0.16)
    for y, method in enumerate(methods):
        runs = [
            run
            for run in group.method_runs(method)
            if str(run.environment.get("device")) == device and phase in run.seconds
        ]
        if not runs:
            continue
        times, color = [_seconds(run, phase) for run in runs], look(method).color
        mean = statistics.fmean(times)
        ax.barh(y, mean, height=0.62, color=color, alpha=0.45)
        hollow = [run.reused is not None and phase == "scoring" for run in runs]
        faces = ["white" if cached else color for cached in hollow]
        ax.scatter(times, [y] * len(runs), s=11, c=faces, edgecolors=color, lw=0.8)
        place = (max(0, *times, mean), y)
        ax.annotate(_span(mean), place, (6, 0), textcoords="offset points", va="center")
    ax.set_xlim(left=0)


def _span(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 1 else duration(seconds)


def _seconds(run: Run, phase: str) -> float:
    return run.mask_seconds if phase == "scoring" else run.seconds[phase]


def _time_words(group: Group, method: str) -> str:
    runs = group.method_runs(method)
    words = [
        f"{phase} {duration(statistics.fmean(_seconds(run, phase) for run in runs))}"
        for phase in ("scoring", "training")
        if all(phase in run.seconds for run in runs)
    ]
    return f"{name(method)}: {', '.join(words)}"
