"""Tables: runs grouped by dataset, model and setting; a cell holds a few seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fisherprune.report import settings
from fisherprune.report.published import PublishedCell, PublishedTable, published_for
from fisherprune.report.settings import Setting
from fisherprune.runs.reader import FinishedRun
from fisherprune.scoring.criteria import criteria

DENSE = "none"
"""The method of runs that are not pruned."""

RunsBySetting = dict[str, tuple[Setting, list[FinishedRun]]]


@dataclass(frozen=True)
class Cell:
    """Runs that differ in nothing but the seed, at least one, by seed."""

    runs: tuple[FinishedRun, ...]

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.runs)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds."""
        return tuple(run.config.seed for run in self.runs)

    def mean(self, weights: str) -> float:
        """Return the mean test accuracy in percent."""
        return statistics.fmean(run.accuracy(weights) for run in self.runs)

    def std(self, weights: str) -> float | None:
        """Return the sample standard deviation (n - 1), None for a single run."""
        if self.n < 2:
            return None
        return statistics.stdev(run.accuracy(weights) for run in self.runs)

    @property
    def effective_sparsity(self) -> float | None:
        """Mean effective sparsity; None where it is not known of all runs."""
        return _mean([run.effective_sparsity for run in self.runs])

    @property
    def flops_share(self) -> float | None:
        """Mean share of the dense network's FLOPs; None where not known of all."""
        return _mean([run.flops_share for run in self.runs])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class MaskOverlap:
    """Jaccard indices between the masks of methods at one sparsity."""

    sparsity: float
    mean: Mapping[tuple[str, str], float]
    """Mean over the seeds that both methods have masks of, by pair in both orders."""
    n: Mapping[tuple[str, str], int]
    """Number of those seeds."""


@dataclass(frozen=True)
class ResultTable:
    """All runs of one dataset, model and setting: methods by sparsities."""

    dataset: str
    model: str
    label: str
    """What sets it apart from other tables of this dataset and model."""
    shared: str
    """What all tables of this dataset and model have besides the defaults."""
    cells: Mapping[tuple[str, float], Cell]
    """By method and sparsity, without the dense runs."""
    dense: Cell | None
    """Runs of method none with the same training."""
    overlaps: tuple[MaskOverlap, ...] = ()
    """Of the sparsities where masks were compared."""

    @property
    def title(self) -> str:
        """Dataset, model and setting."""
        return ", ".join(x for x in (self.dataset, self.model, self.label) if x)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods with at least one run, in the order of ``criteria()``."""
        present = {method for method, _ in self.cells}
        return tuple(method for method in criteria() if method in present)

    @property
    def all_methods(self) -> tuple[str, ...]:
        """The methods, the dense baseline before them."""
        return ((DENSE,) if self.dense else ()) + self.methods

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Sparsities with at least one run."""
        return tuple(sorted({sparsity for _, sparsity in self.cells}))

    @property
    def all_cells(self) -> list[Cell]:
        """The cells, that of the dense runs after them."""
        return [*self.cells.values(), *([self.dense] if self.dense else [])]

    @property
    def runs(self) -> list[FinishedRun]:
        """The runs of all cells and the dense ones."""
        return [run for cell in self.all_cells for run in cell.runs]

    @cached_property
    def published(self) -> PublishedTable | None:
        """Published numbers for this setting."""
        return published_for(self.runs[0].config)

    def method_cells(self, method: str) -> dict[float, Cell]:
        """Return the cells of a method by sparsity, that of the dense runs at 0."""
        if method == DENSE:
            return {0.0: self.dense} if self.dense else {}
        return {s: cell for (m, s), cell in self.cells.items() if m == method}

    def method_runs(self, method: str) -> list[FinishedRun]:
        """Return the runs of a method at all sparsities."""
        return [run for cell in self.method_cells(method).values() for run in cell.runs]

    def highest(self, sparsity: float, weights: str) -> set[str]:
        """Return the methods of the highest mean as it is shown, if some are lower."""
        means = {
            method: round(self.cells[method, sparsity].mean(weights), 2)
            for method in self.methods
            if (method, sparsity) in self.cells
        }
        if len(set(means.values())) < 2:
            return set()
        return {method for method in means if means[method] == max(means.values())}

    @property
    def tells_what_is_left(self) -> bool:
        """Whether effective sparsity or FLOPs are known of any cell."""
        values = [(x.effective_sparsity, x.flops_share) for x in self.cells.values()]
        return any(value is not None for pair in values for value in pair)

    def published_cell(self, method: str, sparsity: float) -> PublishedCell | None:
        """Return the published mean and deviation, where there are any."""
        if self.published is None:
            return None
        if method == DENSE:
            return self.published.dense
        return self.published.cells.get((method, sparsity))

    def difference(self, method: str, sparsity: float, weights: str) -> float | None:
        """Return our mean minus the published one, where there are both."""
        published = self.published_cell(method, sparsity)
        ours = self.method_cells(method).get(sparsity)
        return ours.mean(weights) - published[0] if ours and published else None


def result_tables(runs: Iterable[FinishedRun]) -> list[ResultTable]:
    """Return the tables of all runs, by dataset, model and setting."""
    by_network: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        name = settings.dataset_name(run.config), run.config.model
        by_network.setdefault(name, []).append(run)
    return [
        table
        for (dataset, model), chosen in sorted(by_network.items())
        for table in _tables(dataset, model, chosen)
    ]


def _tables(dataset: str, model: str, runs: Sequence[FinishedRun]) -> list[ResultTable]:
    pruned, dense = _by_setting(runs)
    known: dict[str, Setting] = {k: fields for k, (fields, _) in pruned.items()}
    with_pruned = {settings.key(settings.training(x)) for x in known.values()}
    for key, (fields, _) in dense.items():
        if key not in with_pruned:
            known[key] = fields
    shared = settings.common(list(known.values()))
    shown = {k: v for k, v in shared.items() if k != "data_dir"}
    return [
        ResultTable(
            dataset,
            model,
            _label(fields, shared, alone=len(known) == 1),
            settings.label(shown),
            _cells(pruned[key][1]) if key in pruned else {},
            _dense_cell(dense, fields),
        )
        for key, fields in sorted(known.items())
    ]


def _label(fields: Setting, shared: Setting, *, alone: bool) -> str:
    own = {name: value for name, value in fields.items() if name not in shared}
    return settings.label(own, empty="" if alone else "default setting")


def _by_setting(runs: Sequence[FinishedRun]) -> tuple[RunsBySetting, RunsBySetting]:
    """Return the pruned and the dense runs by the key of their setting."""
    pruned: RunsBySetting = {}
    dense: RunsBySetting = {}
    for run in runs:
        fields, where = settings.setting(run.config), pruned
        if run.config.method == DENSE:
            fields, where = settings.training(fields), dense
        where.setdefault(settings.key(fields), (fields, []))[1].append(run)
    return pruned, dense


def _cells(runs: Sequence[FinishedRun]) -> dict[tuple[str, float], Cell]:
    cells: dict[tuple[str, float], list[FinishedRun]] = {}
    for run in runs:
        where = run.config.method, float(run.config.sparsity)
        cells.setdefault(where, []).append(run)
    return {where: _cell(chosen) for where, chosen in sorted(cells.items())}


def _dense_cell(dense: RunsBySetting, fields: Setting) -> Cell | None:
    found = dense.get(settings.key(settings.training(fields)))
    return _cell(found[1]) if found else None


def _cell(runs: Sequence[FinishedRun]) -> Cell:
    """Make a cell; of dense runs that differ in the mask's fields, one for a seed."""
    by_seed: dict[int, FinishedRun] = {}
    for run in runs:
        by_seed.setdefault(run.config.seed, run)
    return Cell(tuple(by_seed[seed] for seed in sorted(by_seed)))
