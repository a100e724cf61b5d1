"""The dense baseline: one run, however many masks a study varies."""

from __future__ import annotations

from fisherprune.runs.config import MASK_FIELDS


def collapsed(values: dict[str, object]) -> dict[str, object]:
    """Return the fields of a run; for method ``none`` without those of the mask."""
    if values.get("method") != "none":
        return values
    kept = {k: v for k, v in values.items() if k not in MASK_FIELDS}
    return kept | {"sparsity": 0.0}
