"""Published numbers, to stand beside ours where the setting is the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from fisherprune.experiments.published import SKIP
from fisherprune.report.settings import setting
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.option import Effect, about

PublishedCell = tuple[float, float]
"""Mean and standard deviation."""


@dataclass(frozen=True)
class PublishedTable:
    """Published test accuracies in percent: means and standard deviations."""

    source: str
    seeds: tuple[int, ...]
    cells: Mapping[tuple[str, float], PublishedCell]
    """By our code of the method and sparsity."""


def _cells(text: str) -> dict[tuple[str, float], PublishedCell]:
    head, *rows = (line.split() for line in text.strip().splitlines())
    cells = {}
    for sparsity, *pairs in rows:
        for method, mean, std in zip(head, pairs[::2], pairs[1::2], strict=True):
            cells[method, float(sparsity)] = float(mean), float(std)
    return cells


TABLE_1 = PublishedTable(
    source="arXiv 2502.11450, Table 1 (ResNet18, CIFAR-10)",
    seeds=(0, 42, 123),
    cells=_cells(
        """
     random      magnitude   grad_norm   snip        grasp_reversed
0.80 90.78 0.08  91.10 0.12  90.95 0.35  90.74 0.10  87.18 0.51
0.90 89.35 0.13  89.88 0.28  90.39 0.23  90.36 0.34  86.60 0.51
0.95 87.59 0.11  89.23 0.19  89.00 0.05  89.31 0.17  86.50 0.05
0.98 83.47 0.20  85.70 0.33  86.43 0.05  87.26 0.28  85.99 0.08
0.99 78.28 0.45  71.99 0.28  83.47 0.15  84.54 0.04  84.56 0.46
"""
    )
    | _cells(
        """
     fisher_diag fisher_pruner fts       fbss
0.80 90.95 0.11  91.08 0.06  90.94 0.22  90.73 0.33
0.90 90.04 0.21  90.20 0.08  90.55 0.23  89.22 0.30
0.95 88.61 0.28  89.50 0.18  89.47 0.32  87.58 0.25
0.98 85.61 0.20  86.97 0.22  87.24 0.32  83.40 0.74
0.99 82.13 0.28  83.74 0.48  84.85 0.18  77.60 1.02
"""
    ),
)
"""Columns as printed there: Random, Magnitude, GN, SNIP, GraSP, FD, FP, FTS, FBSS."""

GRASP_NOTE = (
    "The published GraSP column stands beside our grasp_reversed: the published code "
    "keeps the weights with the largest -w Hm, the opposite end of the criterion of "
    "Wang et al. 2020, which is our grasp."
)


def published_for(config: TrainConfig) -> PublishedTable | None:
    """Return the published table that runs of this setting may stand beside.

    Table 1 holds for its own setting, which is TrainConfig's default: resnet18 on all
    of cifar10, 160 epochs, no warm-up, groups of one. Fields that only change the
    rounding or the place, and the published choice of prunable weights, may differ.
    """
    if config.model != "resnet18" or not is_cifar10(config):
        return None
    effects = {field.name: about(field).effect for field in fields(TrainConfig)}
    differing = {
        name: value
        for name, value in setting(config).items()
        if effects[name] is Effect.RESULT and (name, config.skip) != ("skip", SKIP)
    }
    return None if differing else TABLE_1


def is_cifar10(config: TrainConfig) -> bool:
    """Return whether the images are those of CIFAR-10, a folder's by its name."""
    if config.dataset == "folder":
        pattern = r"cifar[-_]?10(?!\d)"
        parts = Path(config.data_dir).parts
        return any(re.match(pattern, part, re.IGNORECASE) for part in parts)
    return config.dataset == "cifar10"
