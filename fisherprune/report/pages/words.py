"""What the report says in words and numbers, the same on every kind of page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherprune.report.figures.style import name
from fisherprune.report.load import Study
from fisherprune.report.published import GRASP_NOTE, is_cifar10
from fisherprune.report.tables import Cell, Group, group
from fisherprune.scoring.criteria import criteria, get_criterion

HEADINGS = {
    "best": "Weights of the best validation accuracy",
    "last": "Weights of the last epoch",
}

DEFINITIONS = {
    "sparsity": "Fraction of the prunable weights removed; 0.98 keeps 2 %.",
    "density": "Fraction of a layer's weights kept.",
    "method": "Criterion that scores the weights; the highest scores are kept.",
    "dense": "The same training without pruning.",
    "setting": "All that runs share besides method, sparsity and seed.",
    "mean ± deviation (n)": "Mean test accuracy in percent and sample standard "
    "deviation (divisor n - 1) over n runs of different seeds; no deviation for n = 1.",
    "best validation": "The weights of the epoch with the best result on the "
    "validation images are tested: the protocol of the published tables. The test "
    "images choose nothing.",
    "last epoch": "The weights after the last epoch are tested.",
    "highest mean": "Set in bold. With few seeds it need not be the best method: look "
    "at the deviations.",
    "layer collapse": "A layer of which no weight is kept: nothing passes through it.",
    "Jaccard index": "Weights kept by both of two masks, divided by weights kept by "
    "at least one.",
}

LEGEND = (
    "w: weight, m: its mean gradient, F: mean of its squared gradients, H: diagonal of "
    "the generalized Gauss-Newton matrix, Hm: Hessian-gradient product, g: group size."
)
"""What the letters in the methods' formulas mean."""


@dataclass(frozen=True)
class Report:
    """What the pages are written from."""

    study: Study
    groups: Sequence[Group]

    @classmethod
    def of(cls, study: Study) -> Report:
        """Group the runs of a study."""
        return cls(study, group(study.runs))


def number(mean: float, std: float | None) -> str:
    """Return ``90.78 ± 0.08``, without the deviation where there is none."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def cell_text(cell: Cell | None, weights: str) -> str:
    """Return ``90.78 ± 0.08 (3)``, or a dash where nothing was run."""
    if cell is None:
        return "-"
    return f"{number(cell.mean(weights), cell.std(weights))} ({cell.n})"


def signed(value: float) -> str:
    """Return a difference with its sign, 0.00 without one."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def table_rows(each: Group, weights: str) -> list[list[str]]:
    """Return a group's table as texts: a head, then rows of one sparsity each.

    Where there are published numbers, two more rows follow a sparsity.
    """
    rows = [["sparsity", *(each.methods or ("accuracy",))]]
    for sparsity in each.sparsities:
        cells = [each.cells.get((method, sparsity)) for method in each.methods]
        rows.append([f"{sparsity:g}", *(cell_text(cell, weights) for cell in cells)])
        for title, *texts in published_rows(each, sparsity, weights):
            rows.append([f"  {title}", *texts])
    if each.dense:
        rows.append(["dense", *_dense_row(each, weights)])
    return rows


def published_rows(each: Group, sparsity: float, weights: str) -> list[list[str]]:
    """Return the rows "published" and "difference" of a sparsity, if there are any."""
    known = each.published.cells if each.published else {}
    theirs = [known.get((method, sparsity)) for method in each.methods]
    if not any(theirs):
        return []
    ours = [each.difference(method, sparsity, weights) for method in each.methods]
    return [
        ["published", *(number(*pair) if pair else "" for pair in theirs)],
        ["difference", *("" if x is None else signed(x) for x in ours)],
    ]


def _dense_row(each: Group, weights: str) -> list[str]:
    blank = [""] * max(0, len(each.methods) - 1)
    return [cell_text(each.dense, weights), *blank]


def tally(study: Study) -> str:
    """Return how many runs there are of each kind."""
    parts = [f"{len(study.runs)} finished"]
    for kind in ("failed", "unfinished", "repeated", "problems"):
        if count := len(getattr(study, kind)):
            words = {"repeated": "repeated (not counted)", "problems": "broken files"}
            parts.append(f"{count} {words.get(kind, kind)}")
    return ", ".join(parts)


def facts(report: Report) -> dict[str, str]:
    """Return what runs these are: counts, seeds, machines, versions."""
    runs = report.study.runs
    environments = [run.environment for run in runs]

    def values(key: str) -> str:
        return _listed(str(e[key]) for e in environments if e.get(key) is not None)

    found = {
        "runs": tally(report.study),
        "datasets": _listed(each.dataset for each in report.groups),
        "models": _listed(each.model for each in report.groups),
        "methods": _listed(map(name, methods_of(report))),
        "sparsities": _listed(
            f"{s:g}" for each in report.groups for s in each.sparsities
        ),  # fmt: skip
        "seeds": _listed(map(str, sorted({run.config.seed for run in runs}))),
        "devices": values("device"),
        "torch": values("torch"),
        "commits": _listed(
            _commit(str(e["commit"])) for e in environments if e.get("commit")
        ),  # fmt: skip
    }
    return {key: value for key, value in found.items() if value}


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _commit(text: str) -> str:
    """Shorten a commit; ``+changes`` stays."""
    commit, plus, changes = text.partition("+")
    return f"{commit[:10]}{plus}{changes}"


def group_facts(each: Group) -> str:
    """Return what holds for the runs of a group, in a sentence or two."""
    config, run = each.runs[0].config, each.runs[0]
    size = f"{run.total:,} of {run.parameters:,} parameters are prunable"
    steps = f"{config.epochs} epochs, batches of {config.training_batch_size}"
    shared = f"; besides the defaults: {each.shared}" if each.shared else ""
    seeds = sorted({run.config.seed for run in each.runs})
    return (
        f"Runs: {len(each.runs)}; seeds: {', '.join(map(str, seeds))}; {steps}; {size}"
        f"{shared}."
    )


def group_notes(each: Group) -> list[str]:
    """Return what a reader must know before using a group's numbers."""
    notes = []
    config = each.runs[0].config
    if config.dataset == "folder":
        folder = Path(config.data_dir).name
        jpeg = (
            "CIFAR-10 as image files, JPEGs as far as is known: lossy, so accuracies "
            "can differ a little from those on the original pixels"
            if is_cifar10(config)
            else "they are what is in it, compression included"
        )
        notes.append(f"The images are files in the folder {folder!r}: {jpeg}.")
    if each.published:
        seeds = ", ".join(map(str, each.published.seeds))
        notes.append(
            f"Published: {each.published.source}, mean and standard deviation over "
            f"seeds {seeds}, at the best validation accuracy. Difference: ours minus "
            "published, in percentage points."
        )
        if "grasp_reversed" in each.methods:
            notes.append(GRASP_NOTE)
        if config.amp:
            notes.append("These runs trained in bfloat16 (amp), the published did not.")
    ns = {cell.n for cell in each.cells.values()}
    if len(ns) > 1 or len(each.cells) < len(each.methods) * len(each.sparsities):
        notes.append(
            "The study is partial: not every cell has the same number of runs; n "
            "stands in each."
        )
    notes += _mixed(each)
    notes += [f"{run.name}: {text}" for run in each.runs for text in run.notes]
    if text := collapse_note(each):
        notes.append(text)
    return notes


def _mixed(each: Group) -> list[str]:
    """Say where runs of one table come from different machines or versions."""
    notes = []
    for key, what in {"device": "devices", "torch": "versions of torch"}.items():
        found = _listed(str(run.environment.get(key)) for run in each.runs)
        if ", " in found:
            notes.append(f"The runs of this table come from different {what}: {found}.")
    return notes


def collapse_note(each: Group) -> str:
    """Return where layers have collapsed, "" where none has."""
    found: dict[str, int] = {}
    for (method, sparsity), cell in each.cells.items():
        if count := sum(bool(run.collapsed) for run in cell.runs):
            found[f"{method} at {sparsity:g}"] = count
    if not found:
        return ""
    places = ", ".join(f"{where} ({count})" for where, count in found.items())
    return f"Layers have collapsed in (number of runs): {places}."


def seconds_rows(each: Group) -> list[list[str]]:
    """Return mean seconds by method and phase as texts, head first."""
    phases = list(dict.fromkeys(p for run in each.runs for p in run.seconds))
    rows = [["method", "runs", *phases]]
    for method in each.all_methods:
        runs = each.method_runs(method)
        rows.append([name(method), str(len(runs)), *(_mean(runs, p) for p in phases)])
    return rows


def _mean(runs, phase: str) -> str:
    found = [run.seconds[phase] for run in runs if phase in run.seconds]
    return f"{sum(found) / len(found):.1f}" if found else "-"


def remarks(study: Study) -> dict[str, list]:
    """Return what is not in the tables, by heading; empty kinds are left out."""
    kinds = {
        "Broken files": study.problems,
        "Failed runs": study.failed,
        "Unfinished runs": study.unfinished,
        "Repeated runs, counted once": study.repeated,
    }
    return {heading: found for heading, found in kinds.items() if found}


def method_lines(methods: Iterable[str]) -> dict[str, str]:
    """Return what each method's score is."""
    return {m: get_criterion(m).summary.replace("``", "") for m in methods}


def methods_of(report: Report) -> list[str]:
    """Return the methods of all runs, in the order of ``criteria()``."""
    present = {run.config.method for run in report.study.runs}
    return [method for method in criteria() if method in present]
