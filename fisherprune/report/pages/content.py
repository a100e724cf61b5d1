"""What a report says: the numbers as texts, and the sentences; every page shows it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fisherprune.report.figures.style import method_name
from fisherprune.report.figures.svg import DrawnFigure
from fisherprune.report.load import FoundRuns, Remark
from fisherprune.report.pages.notes import table_facts, table_notes
from fisherprune.report.published import PublishedCell
from fisherprune.report.tables import Cell, ResultTable, result_tables
from fisherprune.runs.reader import WEIGHTS, FinishedRun
from fisherprune.scoring.criteria import criteria, get_criterion

HEADINGS = {
    "best": "Weights of the best validation accuracy",
    "last": "Weights of the last epoch",
}

DEFINITIONS = {
    "sparsity": "Fraction of the prunable weights removed; 0.98 keeps 2 %.",
    "density": "Fraction of a layer's weights kept.",
    "effective sparsity": "Fraction of the prunable weights removed or on no path from "
    "an input to an output (Vysogorets and Kempe, 2023): a weight that is kept does "
    "nothing where all weights before or after it are removed, or where it meets "
    "the padding of small images alone.",
    "FLOPs": "Of the convolutions and matrix products of one image's forward pass, "
    "those of weights that are kept, in percent of all.",
    "method": "Criterion that scores the weights; the highest scores are kept.",
    "dense": "The same training without pruning.",
    "setting": "All that runs share besides method, sparsity and seed.",
    "mean ± deviation (n)": "Mean test accuracy in percent and sample standard "
    "deviation (divisor n - 1) over n runs of different seeds; no deviation for n = 1.",
    "best validation": "The weights of the epoch with the best result on the "
    "validation images are tested, as in arXiv 2502.11450. The test images play "
    "no part in the choice.",
    "last epoch": "The weights after the last epoch are tested.",
    "highest mean": "In bold on the page. With few seeds it may not belong to the best "
    "method: compare the deviations.",
    "layer collapse": "No weight of a layer is kept: nothing passes through it.",
    "Jaccard index": "Number of weights that both of two masks keep, divided by the "
    "number of weights that at least one keeps.",
}

LEFT_HEADING = "What the masks leave"
LEFT_CAPTION = (
    "Effective sparsity, and FLOPs in % of the dense network; mean over seeds."
)
ACCURACY_CAPTION = "Test accuracy in %, mean ± standard deviation (n)."

SAVED = {
    "step, dense, ms": ("dense_step", 1e-3),
    "step, sparse, ms": ("sparse_step", 1e-3),
    "weights, dense, MB": ("dense_weights", 1e6),
    "weights, sparse, MB": ("weights", 1e6),
    "optimizer, dense, MB": ("dense_optimizer", 1e6),
    "optimizer, sparse, MB": ("optimizer", 1e6),
}
"""What runs with sparse layers tell: the key, and its unit in theirs, by heading."""

LEGEND = (
    "w: weight, m: its mean gradient, F: mean of its squared gradients, H: diagonal of "
    "the generalized Gauss-Newton matrix, D: the Hessian's, estimated, Hm: "
    "Hessian-gradient product, R: derivative of the synaptic flow, "
    "P: gradient of the loss after a few steps, K: derivative of the tangent kernel's "
    "trace for a mask, g: group size."
)
"""What the letters in the methods' formulas mean."""


@dataclass(frozen=True)
class Report:
    """Runs and their tables."""

    found: FoundRuns
    tables: Sequence[ResultTable]

    @classmethod
    def of(cls, found: FoundRuns) -> Report:
        """Make the tables of runs."""
        return cls(found, result_tables(found.finished))

    @property
    def tally(self) -> str:
        """How many runs there are of each kind."""
        counts: dict[str, Sequence[object]] = {
            "finished": self.found.finished,
            "failed": self.found.failed,
            "unfinished": self.found.unfinished,
            "repeated (not counted)": self.found.repeated,
            "broken files": self.found.problems,
        }
        return ", ".join(
            f"{len(runs)} {kind}"
            for kind, runs in counts.items()
            if runs or kind == "finished"
        )

    @property
    def methods(self) -> list[str]:
        """The methods of all runs, in the order of ``criteria()``."""
        present = {run.config.method for run in self.found.finished}
        return [method for method in criteria() if method in present]


class Value(NamedTuple):
    """A number of a table as text, with what belongs to it."""

    mean: str = ""
    std: str = ""
    n: int | None = None
    highest: bool = False

    def __str__(self) -> str:
        """Return ``90.78 ± 0.08 (3)``, without what there is not."""
        text = f"{self.mean} ± {self.std}" if self.std else self.mean
        return f"{text} ({self.n})" if self.n else text


class Left(NamedTuple):
    """What masks leave of a network, as texts."""

    effective_sparsity: str = "-"
    flops: str = "-"

    def __str__(self) -> str:
        """Return ``0.9912, 1.3 %``."""
        return "-" if self == Left() else f"{self.effective_sparsity}, {self.flops}"


class Row(NamedTuple):
    """A row of a table of accuracies."""

    kind: str
    """``sparsity``, ``published`` (numbers beside the row above) or ``dense``."""
    title: str
    values: Sequence[Value]
    """Of each method; of a dense row only one."""


def content_of(
    report: Report,
    figures: Sequence[Sequence[DrawnFigure]] = (),
    comparisons: Sequence[DrawnFigure] = (),
) -> dict[str, object]:
    """Return what the templates are filled with.

    Args:
        report: runs and tables.
        figures: those of each table, in the order of ``report.tables``.
        comparisons: figures of several tables.
    """
    own = figures or [()] * len(report.tables)
    return {
        "tally": report.tally,
        "facts": _facts(report),
        "problems": report.found.problems,
        "sections": [_section(*x) for x in zip(report.tables, own, strict=True)],
        "comparisons": comparisons,
        "remarks": _remarks(report.found),
        "definitions": DEFINITIONS,
        "legend": LEGEND,
        "methods": {
            method: get_criterion(method).summary.replace("``", "")
            for method in report.methods
        },
    }


def _section(table: ResultTable, figures: Sequence[DrawnFigure]) -> dict[str, object]:
    """Return what the pages show of one table of runs."""
    accuracies = {HEADINGS[w]: accuracy_rows(table, w) for w in WEIGHTS}
    seconds, left = _seconds(table), left_rows(table)
    texts = [
        (heading, ACCURACY_CAPTION, texts_of(table, rows))
        for heading, rows in accuracies.items()
    ]
    if left:
        rows = [[sparsity, *map(str, values)] for sparsity, values in left.items()]
        rows = [["sparsity", *table.methods], *rows]
        texts.append((LEFT_HEADING, LEFT_CAPTION, rows))
    return {
        "title": table.title,
        "facts": table_facts(table),
        "columns": table.methods,
        "accuracies": accuracies,
        "left": left,
        "left_heading": LEFT_HEADING,
        "left_caption": LEFT_CAPTION,
        "seconds": seconds,
        "texts": [*texts, ("Seconds per run, mean", "", seconds)],
        "notes": table_notes(table),
        "figures": figures,
    }


def accuracy_rows(table: ResultTable, weights: str) -> list[list[Row]]:
    """Return the rows of each sparsity, and a dense one.

    Where there are published numbers, two more rows follow a sparsity.
    """
    rows = [_rows(table, sparsity, weights) for sparsity in table.sparsities]
    if table.dense:
        rows.append([Row("dense", "dense", [_value(table.dense, weights)])])
    return rows


def left_rows(table: ResultTable) -> dict[str, list[Left]]:
    """Return what the masks of each method leave, by sparsity; nothing if not known."""
    if not table.tells_what_is_left:
        return {}
    return {
        f"{sparsity:g}": [_left(table.cells.get((m, sparsity))) for m in table.methods]
        for sparsity in table.sparsities
    }


def _left(cell: Cell | None) -> Left:
    sparsity = cell.effective_sparsity if cell else None
    flops = cell.flops_share if cell else None
    return Left(
        "-" if sparsity is None else _below_one(sparsity),
        "-" if flops is None else f"{100 * flops:.2f} %",
    )


def _below_one(sparsity: float) -> str:
    """Return a sparsity that reads 1.0000 where nothing is left, and only there."""
    text = f"{sparsity:.4f}"
    return "> 0.9999" if sparsity < 1 and text == "1.0000" else text


def texts_of(table: ResultTable, rows: Sequence[Sequence[Row]]) -> list[list[str]]:
    """Return a table of accuracies as texts, head first."""
    columns = table.methods or ("accuracy",)
    texts = [["sparsity", *columns]]
    for row in itertools.chain.from_iterable(rows):
        title = f"  {row.title}" if row.kind == "published" else row.title
        blank = [""] * (len(columns) - len(row.values))
        texts.append([title, *map(str, row.values), *blank])
    return texts


def _rows(table: ResultTable, sparsity: float, weights: str) -> list[Row]:
    highest = table.highest(sparsity, weights)
    cells = {m: table.cells.get((m, sparsity)) for m in table.methods}
    values = [_value(cell, weights, m in highest) for m, cell in cells.items()]
    rows = [Row("sparsity", f"{sparsity:g}", values)]
    published = [table.published_cell(m, sparsity) for m in table.methods]
    if any(published):
        differences = [table.difference(m, sparsity, weights) for m in table.methods]
        theirs = [_published_value(pair) for pair in published]
        signed = [Value("" if x is None else _signed(x)) for x in differences]
        rows.append(Row("published", "published", theirs))
        rows.append(Row("published", "difference", signed))
    return rows


def _value(cell: Cell | None, weights: str, highest: bool = False) -> Value:
    if cell is None:
        return Value("-")
    std = cell.std(weights)
    text = "" if std is None else f"{std:.2f}"
    return Value(f"{cell.mean(weights):.2f}", text, cell.n, highest)


def _published_value(cell: PublishedCell | None) -> Value:
    return Value(f"{cell[0]:.2f}", f"{cell[1]:.2f}") if cell else Value()


def _signed(value: float) -> str:
    """Return a difference with its sign, 0.00 without one."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def _seconds(table: ResultTable) -> list[list[str]]:
    phases = list(dict.fromkeys(p for run in table.runs for p in run.seconds))
    saved = SAVED if any(run.execution for run in table.runs) else {}
    rows = [["method", "runs", *phases, *saved]]
    for method in table.all_methods:
        runs = table.method_runs(method)
        means = [_mean_seconds(runs, phase) for phase in phases]
        means += [_mean_saved(runs, key, unit) for key, unit in saved.values()]
        rows.append([method_name(method), str(len(runs)), *means])
    return rows


def _mean_saved(runs: Sequence[FinishedRun], key: str, unit: float) -> str:
    known = [dict(run.execution)[key] for run in runs if run.execution]
    found = [float(str(value)) / unit for value in known if value is not None]
    return f"{sum(found) / len(found):.3g}" if found else "-"


def _mean_seconds(runs: Sequence[FinishedRun], phase: str) -> str:
    found = [run.seconds[phase] for run in runs if phase in run.seconds]
    return f"{sum(found) / len(found):.1f}" if found else "-"


def _facts(report: Report) -> dict[str, str]:
    """Return what runs these are: counts, seeds, machines, versions."""
    runs = report.found.finished
    known = [run.environment for run in runs]
    commits = [str(x["commit"]) for x in known if x.get("commit")]
    facts = {
        "datasets": _listed(table.dataset for table in report.tables),
        "models": _listed(table.model for table in report.tables),
        "methods": _listed(map(method_name, report.methods)),
        "sparsities": _listed(f"{s:g}" for t in report.tables for s in t.sparsities),
        "seeds": _listed(sorted({run.config.seed for run in runs})),
        "devices": _listed(x["device"] for x in known if x.get("device") is not None),
        "torch": _listed(x["torch"] for x in known if x.get("torch") is not None),
        "commits": _listed(map(_short_commit, commits)),
    }
    return {name: text for name, text in facts.items() if text}


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _short_commit(text: str) -> str:
    """Shorten a commit; ``+changes`` stays."""
    commit, plus, changes = text.partition("+")
    return f"{commit[:10]}{plus}{changes}"


def _remarks(found: FoundRuns) -> dict[str, list[Remark]]:
    kinds = {
        "Broken files": found.problems,
        "Failed runs": found.failed,
        "Unfinished runs": found.unfinished,
        "Repeated runs, counted once": found.repeated,
    }
    return {heading: remarks for heading, remarks in kinds.items() if remarks}
