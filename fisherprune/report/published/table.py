"""Published numbers of one setting, and which runs have that setting."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fisherprune.data import IMAGE_SIZES
from fisherprune.report.settings import AXES
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.option import Effect, about

PublishedCell = tuple[float, float]
"""Mean and standard deviation."""
Skip = frozenset[str] | None
Fields = Mapping[str, object]


@dataclass(frozen=True)
class PublishedSetting:
    """What a run must be to stand beside published numbers."""

    dataset: str
    model: str
    values: Fields
    """Of the fields that are not the default one; batch and image size must be there.

    Fields that only change the rounding or the place may differ.
    """
    skips: Collection[Skip]
    """The values of ``skip`` that choose the same weights, in any order."""
    own: Mapping[str, Fields] = field(default_factory=dict)
    """More values that a method had alone."""

    def holds(self, config: TrainConfig, method: str) -> bool:
        """Return whether a run of this config may stand beside numbers of a method."""
        return (
            config.model == self.model
            and has_images_of(self.dataset, config)
            and (None if config.skip is None else frozenset(config.skip)) in self.skips
            and self._has_values(config, {**self.values, **self.own.get(method, {})})
        )

    @staticmethod
    def _has_values(config: TrainConfig, wanted: Fields) -> bool:
        found: dict[str, object] = {
            each.name: getattr(config, each.name)
            for each in fields(TrainConfig)
            if about(each).effect is Effect.RESULT
            and each.name not in (*AXES, "skip")
            and (each.name in wanted or getattr(config, each.name) != each.default)
        }
        found["batch_size"] = config.training_batch_size
        found["image_size"] = config.image_size or IMAGE_SIZES[config.dataset]
        return found == wanted


@dataclass(frozen=True)
class PublishedTable:
    """Published test accuracies in percent: means and standard deviations."""

    source: str
    runs: str
    """Over which runs mean and deviation are."""
    n: int
    """How many they are."""
    chosen: str
    """Which weights were tested."""
    setting: PublishedSetting
    cells: Mapping[tuple[str, float], PublishedCell]
    """By our code of the method and sparsity."""
    dense: PublishedCell | None = None
    """Without pruning."""
    remarks: Mapping[str, str] = field(default_factory=dict)
    """What else to know, by the method that it concerns, "" for all."""

    def beside(self, config: TrainConfig) -> PublishedTable | None:
        """Return the part that runs of this config may stand beside, if there is one.

        That is the cells of the methods that had such a setting.
        """
        methods = {method for method, _ in self.cells}
        held = {method for method in methods if self.setting.holds(config, method)}
        if held == methods:
            return self
        cells = {where: cell for where, cell in self.cells.items() if where[0] in held}
        return replace(self, cells=cells) if cells else None

    def remarks_on(self, methods: Collection[str]) -> list[str]:
        """Return what to know where these methods are shown."""
        return [
            text
            for method, text in self.remarks.items()
            if not method or method in methods
        ]


def has_images_of(dataset: str, config: TrainConfig) -> bool:
    """Return whether a run has a dataset's images, CIFAR-10 as files too."""
    return is_cifar10(config) if dataset == "cifar10" else config.dataset == dataset


def is_cifar10(config: TrainConfig) -> bool:
    """Return whether the images are those of CIFAR-10, a folder's by its name."""
    if config.dataset == "folder":
        pattern = r"cifar[-_]?10(?!\d)"
        parts = Path(config.data_dir).parts
        return any(re.match(pattern, part, re.IGNORECASE) for part in parts)
    return config.dataset == "cifar10"
