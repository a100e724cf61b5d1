"""In which way the gradients of each parameter are found, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("rules", "vmap", "loop", "none")
"""Kinds of ways, from the fastest to what is no way."""
SINGLE_ROWS = 24
"""Of a table with one row for each parameter; longer ones have rows for groups."""


@dataclass(frozen=True, repr=False)
class Coverage:
    """What ``fisherprune.check`` found out about a model.

    Printed, it is a table. Where the model has many parameters, those whose names
    differ in numbers alone, and whose ways do not differ, share a row.

    Attributes:
        ways: by parameter name, as ``GradientMoments.paths``: the names of functions
            for which there is a rule, "vmap", or "loop"; none where it has no way.
        reasons: why, of the parameters whose way is "loop" or none.
        sizes: number of weights by parameter name.
        settings: sentences about what scoring will do otherwise than training, or what
            costs digits.
        samples: with which the model was tried.
    """

    ways: dict[str, tuple[str, ...]]
    reasons: dict[str, str]
    sizes: dict[str, int]
    settings: tuple[str, ...]
    samples: int

    @property
    def covers(self) -> dict[str, float]:
        """Return the fraction of the weights that goes each kind of way.

        By "rules" (the kernels and what else is as fast), "vmap" (a function is
        differentiated for each sample), "loop" (the model runs for each sample alone)
        and "none". A parameter that goes several ways counts for the slowest.
        """
        counts = dict.fromkeys(KINDS, 0)
        for name, ways in self.ways.items():
            counts[_kind(ways)] += self.sizes[name]
        total = sum(counts.values())
        return {kind: count / max(total, 1) for kind, count in counts.items()}

    def __str__(self) -> str:
        """Return the table."""
        shares = ", ".join(f"{kind} {x:.2%}" for kind, x in self.covers.items() if x)
        lines = [
            f"{sum(self.sizes.values()):,} weights in {len(self.sizes)} parameters, "
            f"tried with {self.samples} sample{'s' * (self.samples != 1)}",
            f"ways of the weights: {shares}",
            "",
            *self._table(),
        ]
        notes = enumerate(self._sentences, 1)
        lines += _section("reasons", (f"({i}) {why}" for i, why in notes))
        return "\n".join(lines + _section("settings", self.settings))

    __repr__ = __str__

    @property
    def _sentences(self) -> list[str]:
        return [*dict.fromkeys(self.reasons.values())]

    def _table(self) -> list[str]:
        rows = [self._row(*group) for group in self._groups()]
        wide = max(len("parameter"), *(len(row[0]) for row in rows))
        heads = f"{'parameter':{wide}}  {'weights':>13}  way"
        return [heads, *(f"{n:{wide}}  {size:>13,}  {way}" for n, size, way in rows)]

    def _groups(self) -> Iterable[tuple[str, list[str]]]:
        """Yield the title and the parameters of each row."""
        groups: dict[tuple[str, object, object], list[str]] = {}
        for name, ways in self.ways.items():
            alike = re.sub(r"\d+", "*", name) if len(self.ways) > SINGLE_ROWS else name
            groups.setdefault((alike, ways, self.reasons.get(name)), []).append(name)
        for (alike, *_), names in groups.items():
            several = f"{alike} ({len(names)} parameters)"
            yield (names[0] if len(names) == 1 else several), names

    def _row(self, title: str, names: list[str]) -> tuple[str, int, str]:
        ways, reason = self.ways[names[0]], self.reasons.get(names[0])
        way = ", ".join(ways) or "none"
        size = sum(self.sizes[name] for name in names)
        if reason:
            way += f" ({self._sentences.index(reason) + 1})"
        return title, size, way


def _section(title: str, sentences: Iterable[str]) -> list[str]:
    lines = [f"  {each}" for each in sentences]
    return ["", f"{title}:", *lines] if lines else []


def _kind(ways: tuple[str, ...]) -> str:
    slow = next((kind for kind in ("loop", "vmap") if kind in ways), "rules")
    return slow if ways else "none"
