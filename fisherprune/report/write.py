"""Reads results folders, and writes the report of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fisherprune.files import check_writable, write_text
from fisherprune.report.figures import COMPARISONS, TABLE_FIGURES
from fisherprune.report.figures.svg import DrawnFigure, draw, require_matplotlib
from fisherprune.report.load import load
from fisherprune.report.overlap import with_overlaps
from fisherprune.report.pages.content import Report, content_of
from fisherprune.report.pages.csv_files import pairs_csv, runs_csv, summary_csv
from fisherprune.report.pages.render import html, markdown
from fisherprune.report.tables import ResultTable


def write_report(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Report, Path]:
    """Write report.html, report.md, report.csv, summary.csv and pairs.csv.

    Args:
        paths: see ``load.load``.
        output: folder to write to, made if missing; None is ``report`` in the first of
            ``paths``.
        say: is told about progress, a line at a time.

    Returns:
        What was reported, and the folder. ``report.found.problems`` lists broken files.

    Raises:
        FisherpruneError: where there is nothing to report, matplotlib is missing, or
            the folder can't be written to.
        OSError: where a file can't be written, a full disk say; names the file.
    """
    require_matplotlib()
    found = load(paths)
    first = Path(paths[0])
    folder = Path(output or (first if first.is_dir() else first.parent) / "report")
    check_writable(folder, "output")
    say(f"finished runs read: {len(found.finished)}")
    report = Report.of(found)
    tables = [with_overlaps(table, found.problems, say) for table in report.tables]
    report = replace(report, tables=tables)
    figures = [_draw(each, f"g{n}", say) for n, each in enumerate(tables, 1)]
    content = content_of(report, figures, _comparisons(tables))
    write_text(folder / "report.html", html(content))
    write_text(folder / "report.md", markdown(content))
    write_text(folder / "report.csv", runs_csv(report))
    write_text(folder / "summary.csv", summary_csv(report))
    write_text(folder / "pairs.csv", pairs_csv(report))
    return report, folder


def _draw(table: ResultTable, id: str, say: Callable[[str], None]) -> list[DrawnFigure]:
    """Draw the figures of a table."""
    say(f"drawing: {table.title}")
    return [
        draw(figure, f"{id}-{make.__name__}", f"{figure.heading}: {table.title}")
        for _, make in sorted(TABLE_FIGURES.items())
        if (figure := make(table))
    ]


def _comparisons(tables: Sequence[ResultTable]) -> list[DrawnFigure]:
    """Draw the figures that compare the tables of one dataset and model."""
    networks: dict[tuple[str, str], list[ResultTable]] = {}
    for table in tables:
        networks.setdefault((table.dataset, table.model), []).append(table)
    return [
        draw(figure, f"c{n}-{make.__name__}", f"Settings compared: {figure.heading}")
        for n, several in enumerate(networks.values(), 1)
        for _, make in sorted(COMPARISONS.items())
        if (figure := make(several))
    ]
