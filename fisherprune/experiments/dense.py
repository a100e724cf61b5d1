"""The dense baseline: one run, however many masks a study varies."""

from __future__ import annotations

from typing import Any

from fisherprune.runs.option import names
from fisherprune.runs.parts.mask import MaskConfig


def collapsed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run; for method ``none`` without those of the mask."""
    if values.get("method") != "none":
        return values
    mask = set(names(MaskConfig)) - {"method", "seed"}
    return {k: v for k, v in values.items() if k not in mask} | {"sparsity": 0.0}
