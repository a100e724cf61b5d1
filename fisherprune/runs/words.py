"""The final table of a run, and time spans as people write them."""

from __future__ import annotations

from collections.abc import Sequence

from fisherprune.runs.result import Execution, LayerCount, RunResult


def table(result: RunResult) -> str:
    """Return the final report of a run as text."""
    config, execution = result.config, result.execution
    lines = [
        "",
        f"{config.method} at sparsity {config.sparsity} ({config.scope}), "
        f"{config.model} on {config.dataset}, {config.epochs} "
        f"epoch{'' if config.epochs == 1 else 's'}, seed {config.seed}",
        "",
        aligned(_layer_rows(result.layers)),
        "",
        f"warm-up {duration(result.seconds['warmup'])}, scoring "
        f"{duration(result.seconds['scoring'])}, training "
        f"{duration(result.seconds['training'])} on {result.environment['device']}",
        f"sparsity of the trained weights {result.sparsity:.6f}: {result.kept:,} of "
        f"{result.total:,} prunable weights are kept "
        f"({result.parameters:,} parameters in all)",
        *_left(result),
        *([] if execution is None else [executed(execution, config.amp)]),
        *(f"warning: {warning}" for warning in result.warnings),
        "",
        aligned(_test_rows(result)),
        "",
        f"written to {result.folder}",
    ]
    return "\n".join(lines)


def _left(result: RunResult) -> list[str]:
    """Say what the kept weights can do, as far as it is known."""
    lines, share = [], result.flops_share
    if result.effective_sparsity is not None:
        lines.append(
            f"effective sparsity {result.effective_sparsity:.6f}: {result.effective:,} "
            "weights are on a path from an input to an output"
        )
    if result.flops is not None and share is not None:
        lines.append(
            f"FLOPs of an image {result.flops['masked']:,}: {100 * share:.2f} % of "
            f"{result.flops['dense']:,}, the dense network's"
        )
    return lines


def executed(execution: Execution, amp: bool) -> str:
    """Say what sparse training saved: time of a step, memory."""
    dense, sparse = execution["dense_step"], execution["sparse_step"]
    if dense is None or sparse is None:
        speed = f"{execution['expected']:.1f} times faster by an estimate"
    else:
        speed = (
            f"{1e3 * sparse:.0f} ms a step, dense {1e3 * dense:.0f} ms "
            f"({dense / sparse:.1f} times faster)"
        )
    sizes = {
        "weights": (execution["weights"], execution["dense_weights"]),
        "optimizer": (execution["optimizer"], execution["dense_optimizer"]),
    }
    memory = "; ".join(
        f"{what} {own / 1e6:.2f} MB, dense {full / 1e6:.2f} MB"
        for what, (own, full) in sizes.items()
    )
    layers = execution["sparse_layers"]
    form = "sparse training in bfloat16" if amp else "sparse training"
    return f"{form}, {layers} sparse layers: {speed}; {memory}"


def _layer_rows(layers: tuple[LayerCount, ...]) -> list[list[str]]:
    known = all(x.effective is not None for x in layers)
    rows = [["layer", "kept", "of", "density", *(["on paths"] if known else [])]]
    for x in layers:
        paths = [f"{x.effective:,}"] if known else []
        rows.append([x.name, f"{x.kept:,}", f"{x.total:,}", f"{x.density:.4f}", *paths])
    return rows


def _test_rows(result: RunResult) -> list[list[str]]:
    rows = [["test", "accuracy", "precision", "recall", "F1", "loss"]]
    tested = {"last epoch": result.last}
    if result.config.validation_share > 0:
        tested[f"best validation (epoch {result.best_epoch})"] = result.best
    for name, m in tested.items():
        shares = (m.accuracy, m.precision, m.recall, m.f1)
        cells = [f"{100 * share:.2f} %" for share in shares]
        rows.append([name, *cells, f"{m.loss:.4f}"])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts as columns, the first to the left."""
    titles, *columns = zip(*rows, strict=True)
    width = max(map(len, titles))
    lines = [title.ljust(width) for title in titles]
    for column in columns:
        width = max(map(len, column))
        lines = [f"{x}  {y.rjust(width)}" for x, y in zip(lines, column, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Return a time span as people write it."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{seconds:02} h"
        if hours
        else f"{minutes}:{seconds:02} min"
    )
