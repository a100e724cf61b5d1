"""How much the masks of different methods have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from fisherprune.errors import FisherpruneError
from fisherprune.masks.masks import Masks
from fisherprune.report.load import Remark, problem_of
from fisherprune.report.tables import MaskOverlap, ResultTable
from fisherprune.runs.folder import MASKS
from fisherprune.runs.reader import FinishedRun


def with_overlaps(
    table: ResultTable, problems: list[Remark], say: Callable[[str], None]
) -> ResultTable:
    """Compare the masks of each pair of methods, seed by seed.

    Args:
        table: runs of one setting; those without a mask file are left out.
        problems: mask files that are broken or don't fit are added.
        say: is told about progress.

    Returns:
        The table, with an overlap for each sparsity where at least two methods have
        masks of one seed.
    """
    found = []
    for sparsity in table.sparsities:
        say(f"comparing masks: {table.title}, sparsity {sparsity:g}")
        values: dict[tuple[str, str], list[float]] = {}
        for masks in _masks_by_seed(table, sparsity, problems):
            for a, b in itertools.combinations(masks, 2):
                if (value := _jaccard(masks[a], masks[b], problems)) is not None:
                    values.setdefault((a, b), []).append(value)
        if values:
            found.append(_overlap(sparsity, values))
    return replace(table, overlaps=tuple(found))


def _masks_by_seed(
    table: ResultTable, sparsity: float, problems: list[Remark]
) -> Iterator[dict[str, tuple[FinishedRun, Masks]]]:
    """Yield the masks of each seed by method: those of one seed fit into memory."""
    cells = {m: table.cells.get((m, sparsity)) for m in table.methods}
    runs = [(m, run) for m, cell in cells.items() if cell for run in cell.runs]
    for seed in sorted({run.config.seed for _, run in runs}):
        loaded = {
            method: (run, _load(run, problems))
            for method, run in runs
            if run.config.seed == seed and _has_masks(run)
        }
        yield {m: (run, masks) for m, (run, masks) in loaded.items() if masks}


def _has_masks(run: FinishedRun) -> bool:
    return (run.folder / MASKS).exists()


def _load(run: FinishedRun, problems: list[Remark]) -> Masks | None:
    try:
        return Masks.load(run.folder / MASKS)
    except FisherpruneError as error:
        problems.append(problem_of(run.folder, run.name, error))
        return None


def _jaccard(
    first: tuple[FinishedRun, Masks],
    second: tuple[FinishedRun, Masks],
    problems: list[Remark],
) -> float | None:
    (our_run, ours), (their_run, theirs) = first, second
    try:
        return ours.jaccard(theirs)
    except FisherpruneError as error:
        problems.append(Remark(our_run.name, f"{MASKS}, and {their_run.name}: {error}"))
        return None


def _overlap(
    sparsity: float, values: Mapping[tuple[str, str], list[float]]
) -> MaskOverlap:
    mean, n = {}, {}
    for (a, b), numbers in values.items():
        mean[a, b] = mean[b, a] = sum(numbers) / len(numbers)
        n[a, b] = n[b, a] = len(numbers)
    return MaskOverlap(sparsity, mean, n)


def count_without_masks(table: ResultTable) -> int:
    """Return the number of pruned runs whose mask file is gone."""
    cells = table.cells.values()
    return sum(not _has_masks(run) for cell in cells for run in cell.runs)
