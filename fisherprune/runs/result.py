"""What came out of a run: layer by layer counts, the result file, the final table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fisherprune.masks.masks import Masks
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.metrics import Metrics

FORMAT = 1
"""Of ``results.json``; another number means other contents."""


@dataclass(frozen=True)
class LayerCount:
    """Weights of one prunable parameter."""

    name: str
    outputs: int
    """Length of its first dimension: output channels or features."""
    kept: int
    """Weights the mask keeps; without a mask those that are not zero."""
    total: int
    """All weights."""

    @property
    def density(self) -> float:
        """Fraction kept."""
        return self.kept / self.total

    @property
    def warning(self) -> str | None:
        """What is wrong with the layer, if anything."""
        if self.kept == 0:
            return f"{self.name} has collapsed: none of its {self.total:,} weights kept"
        if self.kept < self.outputs:
            return (
                f"{self.name} keeps {self.kept:,} weights for {self.outputs:,} "
                "outputs: some outputs are constant"
            )
        return None


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run; ``results.json`` holds the same."""

    config: TrainConfig
    folder: Path
    parameters: int
    """All parameters of the network, prunable or not."""
    last: Metrics
    """On the test images, with the weights of the last epoch."""
    best: Metrics
    """On the test images, with the weights of ``best_epoch``."""
    best_epoch: int
    """First epoch of the best validation, from 1; 0 where none was trained."""
    layers: tuple[LayerCount, ...]
    """Of the prunable parameters."""
    scoring: dict[str, object] | None
    """What the scores cost, as ``scoring.make_masks`` says; None without a mask."""
    seconds: dict[str, float]
    """Wall time by phase: data, warmup, scoring, training, testing."""
    environment: dict[str, object]
    """Versions, commit and device."""
    notes: tuple[str, ...] = ()
    """What else to know before the numbers are used."""

    @property
    def kept(self) -> int:
        """Prunable weights that are kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """All prunable weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are removed."""
        return (self.total - self.kept) / self.total

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the accuracy is used."""
        collapsed = (layer.warning for layer in self.layers if layer.warning)
        return (*self.notes, *collapsed)

    def as_json(self) -> dict[str, object]:
        """Return the content of ``results.json``."""
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "parameters": self.parameters,
            "test": {"last": asdict(self.last), "best": asdict(self.best)},
            "best_epoch": self.best_epoch,
            "sparsity": self.sparsity,
            "kept": self.kept,
            "prunable": self.total,
            "layers": {
                layer.name: {"kept": layer.kept, "total": layer.total}
                for layer in self.layers
            },
            "warnings": list(self.warnings),
            "scoring": self.scoring,
            "seconds": self.seconds,
            "environment": self.environment,
        }


@torch.no_grad()
def count_layers(
    parameters: dict[str, nn.Parameter], masks: Masks | None = None
) -> tuple[LayerCount, ...]:
    """Count the weights of each parameter that are kept.

    Those under the masks: a kept weight may well be zero, as biases are at first.
    Without masks those that are not zero.
    """
    kept = parameters if masks is None else masks
    return tuple(
        LayerCount(name, len(p), int(torch.count_nonzero(kept[name])), p.numel())
        for name, p in parameters.items()
    )


@torch.no_grad()
def check_pruned_are_zero(model: nn.Module, masks: Masks) -> None:
    """Raise AssertionError where a weight outside the masks is not exactly zero."""
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        moved = int(torch.count_nonzero(weight[~mask.to(weight.device)]))
        if moved:
            raise AssertionError(f"{moved} pruned weights of {name} are not zero")
