"""The dense baseline: one run, however many masks a study varies."""

from __future__ import annotations

from fisherprune.runs.config import MaskConfig, names


def collapsed(values: dict[str, object]) -> dict[str, object]:
    """Return the fields of a run; for method ``none`` without those of the mask."""
    if values.get("method") != "none":
        return values
    mask = set(names(MaskConfig)) - {"method", "seed"}
    return {k: v for k, v in values.items() if k not in mask} | {"sparsity": 0.0}
