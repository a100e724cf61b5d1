"""How much the masks of different methods have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.report.load import Remark
from fisherprune.report.tables import Group
from fisherprune.runs.folder import MASKS
from fisherprune.runs.reader import Run


@dataclass(frozen=True)
class Overlap:
    """Jaccard indices between the masks of methods at one sparsity."""

    sparsity: float
    mean: Mapping[tuple[str, str], float]
    """Mean over the seeds that both methods have masks of, by pair in both orders."""
    n: Mapping[tuple[str, str], int]
    """Number of those seeds."""


def overlaps(
    group: Group, problems: list[Remark], say: Callable[[str], None]
) -> list[Overlap]:
    """Compare the masks of each pair of methods, seed by seed.

    Args:
        group: runs of one setting; those without a mask file are left out.
        problems: mask files that are broken or don't fit are added.
        say: shows progress.

    Returns:
        One for each sparsity where at least two methods have masks of one seed.
    """
    found = []
    for sparsity in group.sparsities:
        say(f"comparing masks: {group.title}, sparsity {sparsity:g}")
        values: dict[tuple[str, str], list[float]] = {}
        for masks in _by_seed(group, sparsity, problems):
            for (a, first), (b, second) in itertools.combinations(masks.items(), 2):
                if (value := _jaccard(first, second, problems)) is not None:
                    values.setdefault((a, b), []).append(value)
        if values:
            found.append(_overlap(sparsity, values))
    return found


def _by_seed(group: Group, sparsity: float, problems: list[Remark]):
    """Yield the runs with masks of each seed, by method: one seed at a time."""
    seeds = {s for (_, x), c in group.cells.items() if x == sparsity for s in c.seeds}
    for seed in sorted(seeds):
        runs = {
            method: run
            for method in group.methods
            for run in getattr(group.cells.get((method, sparsity)), "runs", ())
            if run.config.seed == seed and (run.folder / MASKS).exists()
        }
        _load.cache_clear()  # a seed's masks at a time are enough in memory
        yield {method: run for method, run in runs.items() if _readable(run, problems)}
    _load.cache_clear()


@lru_cache(maxsize=64)
def _load(path: str) -> Masks:
    return Masks.load(path)


def _readable(run: Run, problems: list[Remark]) -> bool:
    try:
        _load(str(run.folder / MASKS))
        return True
    except FisherpruneError as error:
        text = str(error).replace(str(run.folder / MASKS), MASKS)
        problems.append(Remark(run.name, text))
        return False


def _jaccard(first: Run, second: Run, problems: list[Remark]) -> float | None:
    ours, theirs = (_load(str(run.folder / MASKS)) for run in (first, second))
    try:
        return ours.jaccard(theirs)
    except FisherpruneError as error:
        problems.append(Remark(first.name, f"{MASKS}, and {second.name}: {error}"))
        return None


def _overlap(sparsity: float, values: Mapping[tuple[str, str], list[float]]) -> Overlap:
    mean, n = {}, {}
    for (a, b), numbers in values.items():
        mean[a, b] = mean[b, a] = sum(numbers) / len(numbers)
        n[a, b] = n[b, a] = len(numbers)
    return Overlap(sparsity, mean, n)


def without_masks(group: Group) -> int:
    """Count the pruned runs whose masks are not there any more."""
    cells = group.cells.values()
    return sum(not (r.folder / MASKS).exists() for cell in cells for r in cell.runs)
