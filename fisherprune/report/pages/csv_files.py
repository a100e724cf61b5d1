"""The report as CSV: a file of all runs, and a file of all cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from fisherprune.report.pages.content import Report
from fisherprune.report.paired import pairs_of
from fisherprune.report.printable import printable
from fisherprune.report.settings import AXES
from fisherprune.report.tables import DENSE, ResultTable
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.metrics import METRIC_NAMES
from fisherprune.runs.option import names
from fisherprune.runs.reader import WEIGHTS, FinishedRun
from fisherprune.runs.result import Execution

Cells = dict[str, object]
EXECUTION = tuple(Execution.__annotations__)


def runs_csv(report: Report) -> str:
    """Return a row for each run: the config fields that vary, and all results."""
    runs = sorted(report.found.finished, key=_order)
    varying = [x for x in names(TrainConfig) if x not in AXES and _varies(runs, x)]
    phases = list(dict.fromkeys(p for run in runs for p in run.seconds))
    machine = list(dict.fromkeys(k for run in runs for k in run.environment))
    return _csv(_run_row(run, varying, phases, machine) for run in runs)


def _order(run: FinishedRun) -> tuple[object, ...]:
    return (*(getattr(run.config, name) for name in AXES), run.name)


def _varies(runs: Sequence[FinishedRun], name: str) -> bool:
    return len({repr(getattr(run.config, name)) for run in runs}) > 1


def _run_row(
    run: FinishedRun,
    varying: Sequence[str],
    phases: Sequence[str],
    machine: Sequence[str],
) -> Cells:
    config = asdict(run.config)
    row: Cells = {"folder": run.name}
    row |= {name: config[name] for name in (*AXES, *varying)}
    for weights in WEIGHTS:
        for metric in METRIC_NAMES:
            row[f"test_{weights}_{metric}"] = run.test[weights][metric]
    row |= {
        "best_epoch": run.best_epoch,
        "parameters": run.parameters,
        "prunable": run.total,
        "kept": run.kept,
        "effective": run.effective,
        "effective_sparsity": run.effective_sparsity,
        "collapsed_layers": len(run.collapsed),
        "flops_dense": run.flops and run.flops["dense"],
        "flops_masked": run.flops and run.flops["masked"],
        "seconds_of_cached_statistics": run.reused,
    }
    row |= {f"seconds_{phase}": run.seconds.get(phase) for phase in phases}
    execution: Mapping[str, object] = dict(run.execution or {})
    row |= {f"execution_{key}": execution.get(key) for key in EXECUTION}
    return row | {key: run.environment.get(key) for key in machine}


def summary_csv(report: Report) -> str:
    """Return a row for each cell and weights: n, mean and deviation, and theirs."""
    return _csv(row for table in report.tables for row in _summary_rows(table))


def _summary_rows(table: ResultTable) -> Iterator[Cells]:
    cells = dict(table.cells)
    if table.dense:
        cells = {(DENSE, 0.0): table.dense} | cells
    for (method, sparsity), cell in cells.items():
        published = table.published_cell(method, sparsity) or (None, None)
        for weights in WEIGHTS:
            yield {
                "dataset": table.dataset,
                "model": table.model,
                "setting": table.label,
                "method": method,
                "sparsity": sparsity,
                "weights": weights,
                "n": cell.n,
                "seeds": " ".join(map(str, cell.seeds)),
                "mean": cell.mean(weights),
                "std": cell.std(weights),
                "published_mean": published[0],
                "published_std": published[1],
                "difference": table.difference(method, sparsity, weights),
                "effective_sparsity": cell.effective_sparsity,
                "flops_share": cell.flops_share,
            }


def pairs_csv(report: Report) -> str:
    """Return a row for each weights and pair of methods with enough common seeds."""
    return _csv(
        {"dataset": table.dataset, "model": table.model, "setting": table.label}
        | {"weights": weights}
        | asdict(pair)
        for table in report.tables
        for weights in WEIGHTS
        for pair in pairs_of(table, weights)
    )


def _csv(rows: Iterable[Cells]) -> str:
    """Write rows of equal keys; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            writer.writerow(map(_cell, row))
        writer.writerow(map(_cell, row.values()))
    return text.getvalue()


def _cell(value: object) -> object:
    """Return what is written: an apostrophe before a text that would be a formula.

    Spreadsheets compute what begins with one of ``= + - @``; numbers stay numbers.
    """
    if value is None or isinstance(value, int | float):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text
