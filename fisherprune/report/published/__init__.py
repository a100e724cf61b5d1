"""Published numbers, to stand beside ours where the setting is the same.

A source is a file that makes ``PublishedTable``s: where the numbers come from, what a
run must be to be compared with them, and what differs even then.
"""

from __future__ import annotations

from fisherprune.report.published.synaptic_flow import synaptic_flow_tables
from fisherprune.report.published.table import (
    PublishedCell,
    PublishedSetting,
    PublishedTable,
    is_cifar10,
)
from fisherprune.report.published.table_1 import TABLE_1
from fisherprune.runs.config import TrainConfig

__all__ = [
    "TABLE_1",
    "PublishedCell",
    "PublishedSetting",
    "PublishedTable",
    "is_cifar10",
    "published_for",
    "synaptic_flow_tables",
]


def published_for(config: TrainConfig) -> PublishedTable | None:
    """Return the published table that runs of this setting may stand beside.

    Table 1 of arXiv 2502.11450 holds for its own setting, which is TrainConfig's
    default, and so does each of ``synaptic_flow_tables()`` for its own. Fields that
    only change the rounding or the place may differ, and CIFAR-10 may be image files.
    """
    tables = (TABLE_1, *synaptic_flow_tables())
    return next(filter(None, (table.beside(config) for table in tables)), None)
