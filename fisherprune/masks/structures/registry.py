"""Which structures there are: each selects, of scores and counts, its kind of masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fisherprune.errors import FieldError, shown
from fisherprune.masks.counts import Counts, Shapes

Tensors = dict[str, Tensor]
"""By parameter name."""


@dataclass(frozen=True)
class Selection:
    """What is to be selected, checked.

    Attributes:
        scores: float32 tensors by parameter name, on one or several devices.
        counts: for each of the masks wanted the weights kept.
        least: number of weights that each layer keeps at least.
        among: bool tensors on the devices of the scores; others can't be kept.
        room: number of weights that can be kept of each layer: those of ``among``.
        ties: "error" or "position".
        transposed: names of parameters that lie as [in, out, ...].
        apart: whether a layer's count does not depend on the other layers.
    """

    scores: Tensors
    counts: Sequence[Counts]
    least: Mapping[str, int]
    ties: str = "error"
    among: Tensors | None = None
    room: Mapping[str, int] = field(default_factory=dict)
    transposed: Collection[str] = ()
    apart: bool = False


class Structure:
    """A kind of masks: which weights are kept or pruned together."""

    exact = False
    """Whether as many weights are kept as the counts say, else at most as many."""

    def check(self, scope: str, min_per_layer: int) -> None:
        """Refuse a scope or a least number of weights that the structure can't have."""

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the structure can't have."""

    def step(self, sparsity: float) -> tuple[Structure, float]:
        """Return what keeps as much as a sparsity says, or more, and its sparsity."""
        return self, sparsity

    def unit(self, shape: Sequence[int], transposed: bool) -> int:
        """Return the number of weights that are kept together, the largest one."""
        return 1

    def counts(
        self, counts: Counts, shapes: Shapes, transposed: Collection[str]
    ) -> Counts:
        """Return the weights kept, or at most kept, where a scope has said how many."""
        return counts

    def select(self, selection: Selection) -> list[Tensors]:
        """Return masks for each of the counts; NaN and infinities are refused."""
        raise NotImplementedError


@dataclass(frozen=True)
class Form:
    """How a structure is written: ``pattern`` has its numbers as groups."""

    text: str
    help: str
    pattern: str
    make: Callable[..., Structure]


FORMS: list[Form] = []


def register_structure(
    text: str, help: str, pattern: str = ""
) -> Callable[[type[Structure]], type[Structure]]:
    """Register the decorated class as a structure.

    Args:
        text: how it is written, in messages.
        help: a few words for the command line.
        pattern: regular expression whose groups are the integers that the class is made
            of; ``text`` itself by default.
    """

    def register(make: type[Structure]) -> type[Structure]:
        FORMS.append(Form(text, help, pattern or re.escape(text), make))
        return make

    return register


def structure_of(text: str) -> Structure:
    """Return the structure that is written as ``text``.

    Raises:
        FisherpruneError: where there is none.
    """
    for form in FORMS:
        found = isinstance(text, str) and re.fullmatch(form.pattern, text)
        if found and all(len(number) < 10 for number in found.groups()):
            return form.make(*map(int, found.groups()))
    forms = ", ".join(form.text for form in FORMS)
    raise FieldError("structure", f"one of {forms}", shown(text))
