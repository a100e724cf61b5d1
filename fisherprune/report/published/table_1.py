"""Table 1 of arXiv 2502.11450v1, "Fishing For Cheap And Efficient Pruners"."""

from __future__ import annotations

from fisherprune.experiments.published import SKIP
from fisherprune.report.published.table import (
    PublishedCell,
    PublishedSetting,
    PublishedTable,
)

GRASP_NOTE = (
    "The published GraSP column stands beside our grasp_reversed: the published code "
    "keeps the weights with the largest -w Hm, the opposite end of the criterion of "
    "Wang et al. 2020, which is our grasp."
)


def _cells(text: str) -> dict[tuple[str, float], PublishedCell]:
    head, *rows = (line.split() for line in text.strip().splitlines())
    cells = {}
    for sparsity, *pairs in rows:
        for method, mean, std in zip(head, pairs[::2], pairs[1::2], strict=True):
            cells[method, float(sparsity)] = float(mean), float(std)
    return cells


TABLE_1 = PublishedTable(
    source="arXiv 2502.11450, Table 1 (ResNet18, CIFAR-10)",
    runs="seeds 0, 42, 123",
    n=3,
    chosen="at the best validation accuracy",
    setting=PublishedSetting(
        "cifar10",
        "resnet18",
        {"batch_size": 512, "image_size": 32},
        skips=(None, frozenset(SKIP)),
    ),
    remarks={"grasp_reversed": GRASP_NOTE},
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
