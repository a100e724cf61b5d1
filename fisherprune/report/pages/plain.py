"""The report as plain text for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields

from fisherprune.report.pages import words
from fisherprune.report.pages.words import Report
from fisherprune.report.tables import DENSE, Group
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.metrics import METRIC_NAMES
from fisherprune.runs.reader import WEIGHTS, Run

AXES = ("dataset", "model", "method", "sparsity", "seed")
"""Columns of report.csv whether they vary or not."""


def terminal(report: Report) -> str:
    """Return the table of the best validation weights of each group."""
    blocks = []
    for each in report.groups:
        rows = words.table_rows(each, "best")
        blocks.append(
            f"{each.title}: test accuracy in %, mean ± standard deviation (n), best "
            f"validation weights\n\n{aligned(rows)}"
        )
    blocks.append(f"runs: {words.tally(report.study)}")
    return "\n\n".join(blocks)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts as columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [x.rjust(w) for x, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """Return the whole report but the figures."""
    parts = ["# fisherprune report", ""]
    parts += [f"- {k}: {escape(v)}" for k, v in words.facts(report).items()]
    for each in report.groups:
        parts += ["", *_markdown_group(each)]
    for heading, found in words.remarks(report.study).items():
        parts += ["", f"## {heading}", ""]
        parts += [f"- {escape(x.name)}: {escape(x.text)}" for x in found]
    parts += ["", "## Words", ""]
    parts += _markdown_words(words.DEFINITIONS)
    if methods := words.method_lines(words.methods_of(report)):
        parts += ["", "## Methods", "", escape(words.LEGEND), ""]
        parts += _markdown_words(methods)
    return "\n".join(parts) + "\n"


def _markdown_words(lines: Mapping[str, str]) -> list[str]:
    return [f"- **{escape(k)}**: {escape(v)}" for k, v in lines.items()]


def _markdown_group(each: Group) -> list[str]:
    parts = [f"## {escape(each.title)}", "", escape(words.group_facts(each))]
    for weights in WEIGHTS:
        rows = words.table_rows(each, weights)
        parts += ["", f"### {words.HEADINGS[weights]}", ""]
        parts += ["Test accuracy in %, mean ± standard deviation (n).", ""]
        parts += markdown_table(rows)
    parts += ["", "### Seconds per run, mean", ""]
    parts += markdown_table(words.seconds_rows(each))
    if notes := words.group_notes(each):
        parts += ["", *(f"- {escape(note)}" for note in notes)]
    return parts


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table; the first row is its head, the first column to the left."""
    lines = [f"| {' | '.join(escape(cell.strip()) for cell in row)} |" for row in rows]
    marks = ["---", *("---:" for _ in rows[0][1:])]
    return [lines[0], f"| {' | '.join(marks)} |", *lines[1:]]


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def runs_csv(report: Report) -> str:
    """Return a row for each run: the config fields that vary, and all results."""
    runs = sorted(report.study.runs, key=_order)
    varying = [field.name for field in fields(TrainConfig)
               if field.name not in AXES and _varies(runs, field.name)]  # fmt: skip
    phases = list(dict.fromkeys(p for run in runs for p in run.seconds))
    machine = list(dict.fromkeys(k for run in runs for k in run.environment))
    return _csv(_run_row(run, varying, phases, machine) for run in runs)


def _order(run: Run) -> tuple:
    return (*(getattr(run.config, name) for name in AXES), run.name)


def _varies(runs: Sequence[Run], name: str) -> bool:
    return len({repr(getattr(run.config, name)) for run in runs}) > 1


def _run_row(run: Run, varying, phases, machine) -> dict[str, object]:
    config = asdict(run.config)
    row = {"folder": run.name} | {name: config[name] for name in (*AXES, *varying)}
    for weights in WEIGHTS:
        for metric in METRIC_NAMES:
            row[f"test_{weights}_{metric}"] = run.test[weights][metric]
    row |= {
        "best_epoch": run.best_epoch,
        "parameters": run.parameters,
        "prunable": run.total,
        "kept": run.kept,
        "collapsed_layers": len(run.collapsed),
        "seconds_of_cached_statistics": run.reused,
    }
    row |= {f"seconds_{phase}": run.seconds.get(phase) for phase in phases}
    return row | {key: run.environment.get(key) for key in machine}


def summary_csv(report: Report) -> str:
    """Return a row for each cell and weights: n, mean and deviation, and theirs."""
    return _csv(row for each in report.groups for row in _summary_rows(each))


def _summary_rows(each: Group) -> Iterable[dict[str, object]]:
    cells = dict(each.cells)
    if each.dense:
        cells = {(DENSE, 0.0): each.dense} | cells
    for (method, sparsity), cell in cells.items():
        theirs = None
        if each.published:
            theirs = each.published.cells.get((method, sparsity))
        for weights in WEIGHTS:
            yield {
                "dataset": each.dataset,
                "model": each.model,
                "setting": each.label,
                "method": method,
                "sparsity": sparsity,
                "weights": weights,
                "n": cell.n,
                "seeds": " ".join(map(str, cell.seeds)),
                "mean": cell.mean(weights),
                "std": cell.std(weights),
                "published_mean": theirs[0] if theirs else None,
                "published_std": theirs[1] if theirs else None,
                "difference": cell.mean(weights) - theirs[0] if theirs else None,
            }


def _csv(rows: Iterable[dict[str, object]]) -> str:
    """Write rows of equal keys; None is an empty cell."""
    rows, text = list(rows), io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
