"""What a reader must know of a table besides its numbers, in sentences."""

from __future__ import annotations

from collections.abc import Callable

from fisherprune.report.paired import paired_notes
from fisherprune.report.published import PublishedTable, is_cifar10
from fisherprune.report.settings import folder_name
from fisherprune.report.tables import ResultTable
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.reader import FinishedRun

BY_CHANCE = (
    "Of pairs that do not differ, such a test tells one in twenty apart by chance; "
    "pairs that it does not tell apart may differ, too: more seeds would say. "
    "pairs.csv has every p."
)


def table_facts(table: ResultTable) -> str:
    """Return what holds for the runs of a table, in a sentence or two."""
    config, run = table.runs[0].config, table.runs[0]
    size = f"{run.total:,} of {run.parameters:,} parameters are prunable"
    steps = f"{config.epochs} epochs, batches of {config.training_batch_size}"
    shared = f"; not the default: {table.shared}" if table.shared else ""
    seeds = sorted({run.config.seed for run in table.runs})
    return (
        f"Runs: {len(table.runs)}; seeds: {', '.join(map(str, seeds))}; {steps}; "
        f"{size}{shared}."
    )


def table_notes(table: ResultTable) -> list[str]:
    """Return what a reader must know before using the numbers of a table."""
    config, notes = table.runs[0].config, []
    if config.dataset == "folder":
        notes.append(_folder(config))
    if config.validation_share == 0:
        notes.append(
            "All training images were trained on, none held out: the best weights are "
            "those of the last epoch."
        )
    if table.published:
        notes.append(_published(table.published))
        notes += table.published.remarks_on(table.methods)
        if config.amp:
            notes.append(
                "These runs trained in bfloat16 (amp), the published runs did not."
            )
    ns = {cell.n for cell in table.cells.values()}
    if len(ns) > 1 or len(table.cells) < len(table.methods) * len(table.sparsities):
        notes.append(
            "The study is partial: its cells have different numbers of runs; each "
            "cell shows its n."
        )
    notes += _mixed(table)
    if paired := paired_notes(table, "best"):
        notes += [*paired, BY_CHANCE]
    notes += [f"{run.name}: {text}" for run in table.runs for text in run.notes]
    return notes + _collapsed(table)


def _folder(config: TrainConfig) -> str:
    lossy = (
        "They are probably CIFAR-10 as JPEG files, which are lossy: accuracies can "
        "differ a little from those on the original pixels."
        if is_cifar10(config)
        else "If their compression is lossy, the accuracies depend on it."
    )
    return f"The images are files in the folder {folder_name(config)!r}. {lossy}"


def _published(table: PublishedTable) -> str:
    text = (
        f"Published: {table.source}, mean and standard deviation over {table.runs}, "
        f"{table.chosen}. Difference: ours minus published, in percentage points."
    )
    if table.dense:
        mean, std = table.dense
        text += f" Dense they have {mean:.2f} ± {std:.2f}."
    return text


def _mixed(table: ResultTable) -> list[str]:
    """Say where runs of one table come from different machines or versions."""
    notes = []
    for key, what in {"device": "devices", "torch": "versions of torch"}.items():
        found = dict.fromkeys(str(run.environment.get(key)) for run in table.runs)
        if len(found) > 1:
            listed = ", ".join(found)
            notes.append(
                f"The runs of this table come from different {what}: {listed}."
            )
    return notes


def _collapsed(table: ResultTable) -> list[str]:
    """Say where layers have collapsed, and where nothing gets through a network."""
    kinds: dict[str, Callable[[FinishedRun], bool]] = {
        "Runs with collapsed layers": lambda run: bool(run.collapsed),
        "Runs without a path of kept weights from an input to an output": lambda run: (
            run.effective == 0
        ),
    }
    return [
        f"{heading}: {', '.join(found)}."
        for heading, is_so in kinds.items()
        if (found := _counted(table, is_so))
    ]


def _counted(table: ResultTable, is_so: Callable[[FinishedRun], bool]) -> list[str]:
    """Return in which cells how many runs are so."""
    return [
        f"{count} of {method} at sparsity {sparsity:g}"
        for (method, sparsity), cell in table.cells.items()
        if (count := sum(map(is_so, cell.runs)))
    ]
