"""Which scopes there are: each says how many weights are kept, of all or each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fisherprune.errors import FieldError, shown
from fisherprune.masks.counts import Counts, Densities, Shapes, keep_count


@dataclass(frozen=True)
class Layers:
    """What a scope knows of the parameters, and what it is told.

    Attributes:
        shapes: of the parameters, by name.
        least: number of weights that each keeps at least, no more than it has.
        densities: as they were given, by the same names; None: they were not.
    """

    shapes: Shapes
    least: Mapping[str, int]
    densities: Densities | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def keep(self, sparsity: float) -> int:
        """Return the number of weights kept in all, see ``keep_count``."""
        return keep_count(sum(self.sizes.values()), sparsity)


def _all(layers: Layers) -> int:
    return sum(layers.sizes.values())


Rule = Callable[[Layers, float], Counts]
"""From the layers and a sparsity to the weights kept, of all together or of each."""


@dataclass(frozen=True)
class Scope:
    """A way to say how many weights each layer keeps.

    Attributes:
        name: by which it is chosen.
        help: a few words for the command line.
        counts: the rule; one number means that scores compete over all layers.
        apart: whether a layer's count does not depend on the other layers.
        given: whether densities are given for it.
        most: how many weights can be kept at all.
    """

    name: str
    help: str
    counts: Rule
    apart: bool = False
    given: bool = False
    most: Callable[[Layers], int] = _all


SCOPES: dict[str, Scope] = {}
"""By name."""


def register_scope(
    name: str,
    help: str,
    *,
    apart: bool = False,
    given: bool = False,
    most: Callable[[Layers], int] = _all,
) -> Callable[[Rule], Rule]:
    """Register the decorated rule as a scope; see ``Scope``."""

    def register(rule: Rule) -> Rule:
        SCOPES[name] = Scope(name, help, rule, apart, given, most)
        return rule

    return register


def checked_scope(scope: str, densities: Densities | None = None) -> str:
    """Return ``scope`` if it is one of ``SCOPES``, with densities where it needs them.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(scope, str) or scope not in SCOPES:
        raise FieldError("scope", f"one of {tuple(SCOPES)}", shown(scope))
    if SCOPES[scope].given != (densities is not None):
        givens = ", ".join(name for name, one in SCOPES.items() if one.given)
        wanted = f"given for scope {givens}, and for no other; scope is {scope}"
        raise FieldError("densities", wanted, shown(densities))
    return scope
