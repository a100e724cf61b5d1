"""Time of making the mask and of training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherprune.report.figures.registry import TABLE_FIGURES, Figure, register
from fisherprune.report.figures.style import method_name, method_style
from fisherprune.report.printable import one_line
from fisherprune.report.tables import DENSE, ResultTable
from fisherprune.runs.reader import FinishedRun
from fisherprune.runs.words import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PHASES = {"scoring": "making the mask", "training": "training"}


@register(TABLE_FIGURES, place=6)
def time(table: ResultTable) -> Figure:
    """Show the seconds of scoring and training per run, by method and device."""
    devices = sorted({_device(run) for run in table.runs})
    methods = table.all_methods

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(len(devices), 2, squeeze=False)
        for device, axes in zip(devices, grid, strict=True):
            for ax, (phase, title) in zip(axes, PHASES.items(), strict=True):
                shown = [m for m in methods if m != DENSE or phase == "training"]
                _bars(ax, table, shown, device, phase)
                ax.set_title(f"{title}, {device}" if len(devices) > 1 else title)
                ax.set_xlabel("seconds")

    height = len(devices) * (1.0 + 0.26 * len(methods))
    alt = "; ".join(_alt(table, method) for method in methods)
    return Figure("Time per run", _caption(table, devices), alt, height, paint)


def _caption(table: ResultTable, devices: Sequence[str]) -> str:
    text = (
        "Wall time of one run: making the mask (left) and training (right). Bars are "
        "means over all sparsities and seeds, dots single runs. Compare only times on "
        f"the same device: {', '.join(devices)}."
    )
    if cached := sum(run.reused is not None for run in table.runs):
        text += (
            f" {cached} of {len(table.runs)} runs took their statistics from the cache "
            "(hollow dots): the time that it took to compute them is added."
        )
    return text


def _device(run: FinishedRun) -> str:
    return one_line(run.environment.get("device"))


def _seconds(run: FinishedRun, phase: str) -> float | None:
    return run.mask_seconds if phase == "scoring" else run.seconds.get(phase)


def _bars(
    ax: Axes, table: ResultTable, methods: Sequence[str], device: str, phase: str
) -> None:
    ax.grid(axis="y", visible=False)
    ax.set_yticks(range(len(methods)), [method_name(m) for m in methods])
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.margins(x=0.16)
    for y, method in enumerate(methods):
        times = [
            (seconds, run.reused is not None and phase == "scoring")
            for run in table.method_runs(method)
            if _device(run) == device and (seconds := _seconds(run, phase)) is not None
        ]
        if times:
            _bar(ax, y, method_style(method).color, times)
    ax.set_xlim(left=0)


def _bar(ax: Axes, y: int, color: str, times: Sequence[tuple[float, bool]]) -> None:
    """Draw the mean of some times, a dot for each, and the mean as text.

    Args:
        ax: where to draw.
        y: place of the bar.
        color: of bar and dots.
        times: in seconds, and whether a part of it is from the cache.
    """
    seconds = [each for each, _ in times]
    mean = statistics.fmean(seconds)
    ax.barh(y, mean, height=0.62, color=color, alpha=0.45)
    faces = ["white" if cached else color for _, cached in times]
    ax.scatter(seconds, [y] * len(times), s=11, c=faces, edgecolors=color, lw=0.8)
    place = (max(0, *seconds, mean), y)
    text = f"{mean:.2g} s" if mean < 1 else duration(mean)
    ax.annotate(text, place, (6, 0), textcoords="offset points", va="center")


def _alt(table: ResultTable, method: str) -> str:
    texts = []
    for phase in PHASES:
        times = [_seconds(run, phase) for run in table.method_runs(method)]
        known = [seconds for seconds in times if seconds is not None]
        if len(known) == len(times):
            texts.append(f"{phase} {duration(statistics.fmean(known))}")
    return f"{method_name(method)}: {', '.join(texts)}"
