"""What is known of a field of a configuration besides its name, type and default."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from fisherprune.runs.kinds import Rule


class Effect(enum.Enum):
    """What a field changes."""

    RESULT = "what comes out"
    ROUNDING = "how numbers are computed, and so their rounding"
    PLACE = "where the run happens and what it writes, not what it is"


@dataclass(frozen=True)
class Option:
    """What is known of a field besides its name, its type and its default."""

    help: str
    rules: tuple[Rule, ...]
    effect: Effect
    metavar: str | None
    """What the help calls the value, where its type does not say it."""
    given: bool
    """Whether commands and studies can set it; otherwise it is filled in."""


def option(
    default: Any,
    help: str,
    *rules: Rule,
    effect: Effect = Effect.RESULT,
    metavar: str | None = None,
    hash: bool | None = None,
    given: bool = True,
) -> Any:
    """Return a field with everything that is to be said about it."""
    about = Option(help, rules, effect, metavar, given)
    return field(default=default, hash=hash, metadata={"option": about})


def about(of: Field) -> Option:
    """Return what is known of a field."""
    return of.metadata["option"]


def names(part: type) -> tuple[str, ...]:
    """Return the names of the fields of a part."""
    return tuple(each.name for each in fields(part))


def by_dataset(defaults: Mapping[str, int]) -> str:
    """Return defaults that depend on the dataset, as a help shows them."""
    return f"(default: {', '.join(f'{k} {v}' for k, v in defaults.items())})"
