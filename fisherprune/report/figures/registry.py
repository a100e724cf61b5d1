"""What a figure is, and the lists that all figures register in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fisherprune.report.tables import ResultTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Figure:
    """A figure, or the sentence that stands where there can be none."""

    heading: str
    caption: str
    alt: str = ""
    """What is seen, in words."""
    height: float = 0
    """In inches."""
    paint: Callable[[Canvas], None] | None = None
    """Draws it; None: only the caption is shown, which says why."""


Subject = TypeVar("Subject")
Make = Callable[[Subject], "Figure | None"]
"""Makes a figure of a table or of several; None where there is nothing to show."""

TABLE_FIGURES: dict[int, Make[ResultTable]] = {}
"""Those of one table, by their place on the page."""
COMPARISONS: dict[int, Make[Sequence[ResultTable]]] = {}
"""Those of all tables of one dataset and model, by their place on the page."""


def register(
    figures: dict[int, Make[Subject]], place: int
) -> Callable[[Make[Subject]], Make[Subject]]:
    """Return a decorator that adds a function to a list; its name ends the ids."""

    def add(make: Make[Subject]) -> Make[Subject]:
        if figures.setdefault(place, make) is not make:
            raise ValueError(f"place must be free, got {place}")
        return make

    return add
