"""The final table of a run, and time spans as people write them."""

from __future__ import annotations

from fisherprune.runs.result import LayerCount, RunResult


def table(result: RunResult) -> str:
    """Return the final report of a run as text."""
    config = result.config
    lines = [
        "",
        f"{config.method} at sparsity {config.sparsity} ({config.scope}), "
        f"{config.model} on {config.dataset}, {config.epochs} "
        f"epoch{'' if config.epochs == 1 else 's'}, seed {config.seed}",
        "",
        *_layer_lines(result.layers),
        "",
        f"warm-up {duration(result.seconds['warmup'])}, scoring "
        f"{duration(result.seconds['scoring'])}, training "
        f"{duration(result.seconds['training'])} on {result.environment['device']}",
        f"sparsity of the trained weights {result.sparsity:.6f}: {result.kept:,} of "
        f"{result.total:,} prunable weights are kept "
        f"({result.parameters:,} parameters in all)",
        *(f"warning: {warning}" for warning in result.warnings),
        "",
        *_test_lines(result),
        "",
        f"written to {result.folder}",
    ]
    return "\n".join(lines)


def _layer_lines(layers: tuple[LayerCount, ...]) -> list[str]:
    width = max(len("layer"), *(len(layer.name) for layer in layers))
    lines = [f"{'layer':{width}}  {'kept':>10}  {'of':>10}  {'density':>8}"]
    for x in layers:
        lines.append(f"{x.name:{width}}  {x.kept:10,}  {x.total:10,}  {x.density:8.4f}")
    return lines


def _test_lines(result: RunResult) -> list[str]:
    last = ("last epoch", result.last)
    best = (f"best validation (epoch {result.best_epoch})", result.best)
    width = max(len(last[0]), len(best[0]))
    heads = ("accuracy", "precision", "recall", "F1", "loss")
    lines = [f"{'test':{width}}" + "".join(f"  {head:>9}" for head in heads)]
    for name, m in (last, best):
        shares = (m.accuracy, m.precision, m.recall, m.f1)
        cells = [f"{100 * share:7.2f} %" for share in shares] + [f"{m.loss:9.4f}"]
        lines.append(f"{name:{width}}" + "".join(f"  {cell}" for cell in cells))
    return lines


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
