"""Which methods differ by more than seeds do: paired t tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

from fisherprune.report.tables import Cell, ResultTable

LEAST_SEEDS = 3
LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """Two methods at one sparsity, compared over the seeds that both have.

    Attributes:
        sparsity: of both.
        better: the method of the higher mean.
        worse: the other one.
        n: number of seeds.
        difference: mean of the differences in test accuracy, in percentage points.
        p: two-sided, of the paired t test that the true difference is 0.
    """

    sparsity: float
    better: str
    worse: str
    n: int
    difference: float
    p: float

    @property
    def is_told_apart(self) -> bool:
        """Whether the test says that they differ."""
        return self.p < LEVEL


def pairs_of(table: ResultTable, weights: str) -> list[Pair]:
    """Return all pairs of methods with enough seeds in common, by sparsity.

    Runs of one seed share initialization, order and augmentation, so differences
    vary less than accuracies do: the statistic is their mean over its standard error,
    with n - 1 degrees of freedom (Student 1908).
    """
    return [
        pair
        for sparsity in table.sparsities
        for pair in _pairs(table, sparsity, weights)
    ]


def _pairs(table: ResultTable, sparsity: float, weights: str) -> Iterator[Pair]:
    cells = {m: c for m in table.methods if (c := table.cells.get((m, sparsity)))}
    for (a, one), (b, other) in combinations(cells.items(), 2):
        mine, theirs = _by_seed(one, weights), _by_seed(other, weights)
        seeds = mine.keys() & theirs.keys()
        if len(seeds) < LEAST_SEEDS:
            continue
        differences = [mine[seed] - theirs[seed] for seed in sorted(seeds)]
        mean = fmean(differences)
        better, worse = (a, b) if mean >= 0 else (b, a)
        p = _p(differences)
        yield Pair(sparsity, better, worse, len(seeds), abs(mean), p)


def _by_seed(cell: Cell, weights: str) -> dict[int, float]:
    return {run.config.seed: run.accuracy(weights) for run in cell.runs}


def _p(differences: list[float]) -> float:
    """Return the p value; of equal differences 0, or 1 where they are 0."""
    from scipy.stats import t  # it takes a while to import

    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * t.sf(abs(mean) / error, len(differences) - 1))


def paired_notes(table: ResultTable, weights: str) -> list[str]:
    """Say which methods the tests tell apart, a sentence for each sparsity."""
    notes, pairs = [], pairs_of(table, weights)
    for sparsity in dict.fromkeys(pair.sparsity for pair in pairs):
        every = [pair for pair in pairs if pair.sparsity == sparsity]
        apart = [pair for pair in every if pair.is_told_apart]
        over: dict[str, list[str]] = {}
        for pair in apart:
            text = f"{pair.worse} (+{pair.difference:.2f})"
            over.setdefault(pair.better, []).append(text)
        found = "; ".join(f"{m} over {', '.join(w)}" for m, w in over.items())
        notes.append(
            f"Sparsity {sparsity:g}, {weights} weights: paired t tests over the seeds "
            f"tell {len(apart)} of {len(every)} pairs of methods apart "
            f"(p below {LEVEL:g}){': ' if found else ''}{found}."
        )
    return notes
