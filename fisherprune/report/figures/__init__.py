"""The figures of the report: a file for each, found by itself.

To add a figure is to add a file with a function that returns a ``Figure`` and is
registered: see ``registry.py``.
"""

import importlib
import pkgutil

from fisherprune.report.figures.registry import COMPARISONS, TABLE_FIGURES

__all__ = ["COMPARISONS", "TABLE_FIGURES"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
