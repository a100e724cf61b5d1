"""Reads results folders, and writes the report of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fisherprune.errors import FisherpruneError
from fisherprune.files import check_writable, write_text
from fisherprune.report import load
from fisherprune.report.figures import curves as figures
from fisherprune.report.figures import masks as maskfigures
from fisherprune.report.figures import settings as comparison
from fisherprune.report.figures.svg import Figure, require_matplotlib
from fisherprune.report.load import Study
from fisherprune.report.overlap import overlaps, without_masks
from fisherprune.report.pages import html, plain
from fisherprune.report.pages.words import Report
from fisherprune.report.tables import Group


def write_report(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Report, Path]:
    """Write report.html, report.md, report.csv and summary.csv.

    Args:
        paths: see ``load.load``.
        output: folder to write to, made if missing; None is ``report`` in the first of
            ``paths``.
        say: is told about progress, a line at a time.

    Returns:
        What was reported, and the folder. ``report.study.problems`` lists broken files.

    Raises:
        FisherpruneError: where there is nothing to report, matplotlib is missing, or
            the folder can't be written to.
    """
    require_matplotlib()
    study = load.load(paths)
    first = Path(paths[0])
    folder = Path(output or (first if first.is_dir() else first.parent) / "report")
    check_writable(folder, "output")
    report = Report.of(study)
    say(f"finished runs read: {len(study.runs)}")
    drawn = [
        _draw(each, f"g{number}", study, say)
        for number, each in enumerate(report.groups, 1)
    ]
    compared = [
        comparison.compare(several, f"c{number}")
        for number, several in enumerate(comparison.comparable(report.groups), 1)
    ]
    _write(
        folder,
        {
            "report.html": html.page(report, drawn, compared),
            "report.md": plain.markdown(report),
            "report.csv": plain.runs_csv(report),
            "summary.csv": plain.summary_csv(report),
        },
    )
    return report, folder


def _draw(
    each: Group, id: str, study: Study, say: Callable[[str], None]
) -> list[Figure]:
    """Return the figures of a group; broken mask files become problems."""
    found = overlaps(each, study.problems, say)
    say(f"drawing: {each.title}")
    drawn = []
    if each.cells:
        drawn += [
            figures.accuracy(each, f"{id}-accuracy"),
            maskfigures.density(each, f"{id}-density"),
            maskfigures.jaccard(each, found, without_masks(each), f"{id}-overlap"),
        ]
    return [
        *drawn,
        figures.curves(each, f"{id}-curves"),
        figures.time(each, f"{id}-time"),
    ]


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise FisherpruneError(
            f"output must be a folder that can be written to, got {folder}: "
            f"{error.strerror}"
        ) from error
