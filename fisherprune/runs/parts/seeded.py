"""What every part of a run shares."""

from __future__ import annotations

from dataclasses import dataclass

from fisherprune.runs.kinds import must
from fisherprune.runs.option import option


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """What every part shares."""

    seed: int = option(
        0,
        "of all random choices but the train/validation split",
        must(lambda seed: abs(seed) < 10**100, "of at most 100 digits"),
    )
