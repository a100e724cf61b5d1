"""What came out of a run: the record that ``results.json`` holds, and its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from fisherprune.masks.compare import count
from fisherprune.masks.masks import Masks
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.metrics import Metrics

FORMAT = 1
"""Of ``results.json``; another number means other contents."""


@dataclass(frozen=True)
class LayerCount:
    """Weights of one prunable parameter."""

    name: str
    outputs: int | None
    """Length of its first dimension: output channels or features; None in old files."""
    kept: int
    """Weights the mask keeps; without a mask those that are not zero."""
    total: int
    """All weights."""
    effective: int | None = None
    """Kept weights on a path from an input to an output; None where it is not known."""

    @property
    def density(self) -> float:
        """Fraction kept."""
        return self.kept / self.total

    @property
    def warning(self) -> str | None:
        """What is wrong with the layer, if anything."""
        if self.kept == 0:
            return f"{self.name} has collapsed: none of its {self.total:,} weights kept"
        if self.effective == 0:
            return (
                f"{self.name} keeps {self.kept:,} weights, none of them on a path from "
                "an input to an output"
            )
        if self.outputs is not None and self.kept < self.outputs:
            return (
                f"{self.name} keeps {self.kept:,} weights for {self.outputs:,} "
                "outputs: some outputs are constant"
            )
        return None


class ScoringCost(TypedDict):
    """What the scores cost."""

    seconds: float
    """Of the passes over the data, when they were run."""
    samples: int
    """In one pass."""
    cached: bool
    """Whether all statistics came from the cache."""


class FlopCount(TypedDict):
    """FLOPs of one image's forward pass; see ``fisherprune.flops``."""

    dense: int
    """Of the whole network."""
    masked: int
    """Of what the mask leaves of it."""


class Execution(TypedDict):
    """How a network was trained without its pruned weights."""

    sparse_layers: int
    """Layers that hold kept weights alone."""
    expected: float
    """How many times faster than dense a step was expected to be."""
    dense_step: float | None
    """Seconds of a step with dense layers, measured; None with several processes."""
    sparse_step: float | None
    """The same with sparse layers."""
    weights: int
    """Bytes of all parameters as they were trained."""
    dense_weights: int
    """The same with dense layers."""
    optimizer: int
    """Bytes of what the optimizer remembers."""
    dense_optimizer: int
    """The same with dense layers."""


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
    scoring: ScoringCost | None
    """None without a mask."""
    seconds: Mapping[str, float]
    """Wall time by phase: data, warmup, scoring, training, testing."""
    environment: Mapping[str, object]
    """Versions, commit and device."""
    notes: tuple[str, ...] = ()
    """What else to know before the numbers are used."""
    flops: FlopCount | None = None
    """None where they are not known."""
    execution: Execution | None = None
    """None where all layers were dense."""

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
    def effective(self) -> int | None:
        """Kept weights on a path from an input to an output; None: not known."""
        counts = [layer.effective for layer in self.layers]
        return None if None in counts else sum(filter(None, counts))

    @property
    def effective_sparsity(self) -> float | None:
        """Fraction of the prunable weights that are on no such path."""
        if self.effective is None:
            return None
        return (self.total - self.effective) / self.total

    @property
    def flops_share(self) -> float | None:
        """FLOPs of what the mask leaves as a fraction of the dense network's."""
        if self.flops is None or not self.flops["dense"]:
            return None
        return self.flops["masked"] / self.flops["dense"]

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers of which nothing is kept."""
        return tuple(layer.name for layer in self.layers if layer.kept == 0)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the accuracy is used."""
        if self.effective == 0:  # which says it of each layer
            gone = (layer.warning for layer in self.layers if not layer.kept)
            text = "no kept weight is on a path from an input to an output"
            return (*self.notes, *filter(None, gone), text)
        layers = (layer.warning for layer in self.layers)
        return (*self.notes, *filter(None, layers))

    @property
    def test(self) -> dict[str, dict[str, float]]:
        """The metrics on the test images by which weights were tested and by name."""
        return {"last": asdict(self.last), "best": asdict(self.best)}

    def accuracy(self, weights: str) -> float:
        """Return the test accuracy of ``best`` or ``last`` weights in percent."""
        return 100 * self.test[weights]["accuracy"]

    @property
    def reused(self) -> float | None:
        """Seconds that cached statistics took when they were computed."""
        if self.scoring is None or not self.scoring["cached"]:
            return None
        return self.scoring["seconds"] or None  # no statistics: no seconds

    @property
    def mask_seconds(self) -> float | None:
        """What the mask costs without a cache; None where it is not recorded."""
        if "scoring" not in self.seconds:
            return None
        return self.seconds["scoring"] + (self.reused or 0)

    def as_json(self) -> dict[str, object]:
        """Return the content of ``results.json``; ``reader.read_run`` reads it back."""
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "parameters": self.parameters,
            "test": self.test,
            "best_epoch": self.best_epoch,
            "sparsity": self.sparsity,
            "kept": self.kept,
            "prunable": self.total,
            "effective": self.effective,
            "effective_sparsity": self.effective_sparsity,
            "flops": self.flops,
            "execution": self.execution,
            "layers": {x.name: _layer_as_json(x) for x in self.layers},
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "scoring": self.scoring,
            "seconds": self.seconds,
            "environment": self.environment,
        }


def _layer_as_json(layer: LayerCount) -> dict[str, int | None]:
    names = ("kept", "total", "outputs", "effective")
    return {name: getattr(layer, name) for name in names}


def count_layers(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    effective: Mapping[str, Tensor] | None = None,
) -> tuple[LayerCount, ...]:
    """Count the weights of each parameter that are kept, and those on paths."""
    return tuple(
        LayerCount(
            name,
            len(p),
            count(masks[name]),
            p.numel(),
            None if effective is None else count(effective[name]),
        )
        for name, p in parameters.items()
    )


def check_pruned_are_zero(weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Raise AssertionError where a weight outside the masks is not exactly zero."""
    for name, mask in masks.items():
        weight = weights[name]
        moved = int(torch.count_nonzero(weight[~mask.to(weight.device)]))
        if moved:
            raise AssertionError(f"{moved} pruned weights of {name} are not zero")
