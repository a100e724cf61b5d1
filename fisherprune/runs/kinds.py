"""What the values of a configuration or a file must be: kinds and rules.

A kind belongs to a type: words for it, a test, and how equal values are made alike.
A rule belongs to one field: it returns what the value must be, where it is something
else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Rule = Callable[[Any], "str | None"]
MAX_WHOLE = 2**31 - 1
"""Largest whole number of a run but for the seed; more is more than PyTorch takes."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind(Generic[T_co]):
    """What a value must be, in words, as a test, and what is made of it."""

    words: str
    accepts: Callable[[Any], object]
    convert: Callable[[Any], T_co] = _same


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return _is_whole(value) and value.bit_length() < 1024  # what float() can take
    return isinstance(value, float)


def list_of(kind: Kind[T]) -> Kind[tuple[T, ...]]:
    """Return the kind of lists of a kind; they become tuples."""
    words = kind.words.removeprefix("a ")
    return Kind(
        f"a list of {words}s",
        lambda value: isinstance(value, list | tuple) and all(map(kind.accepts, value)),
        lambda value: tuple(map(kind.convert, value)),
    )


def named(*names: str) -> Kind[str]:
    """Return the kind of some names, or of a single one."""
    words = ", ".join(map(repr, names))
    return Kind(words if len(names) == 1 else f"one of {words}", names.__contains__)


NUMBER: Kind[float] = Kind("a number", _is_number, float)
FINITE: Kind[float] = Kind(
    "a finite number", lambda value: _is_number(value) and math.isfinite(value), float
)
SHARE: Kind[float] = Kind(
    "a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1, float
)
WHOLE: Kind[int] = Kind("a whole number", _is_whole)
COUNT: Kind[int] = Kind(
    "a whole number in [0, 2^63)", lambda value: _is_whole(value) and 0 <= value < 2**63
)
TEXT: Kind[str] = Kind("a string", lambda value: isinstance(value, str))
SWITCH: Kind[bool] = Kind("true or false", lambda value: isinstance(value, bool))
KINDS: dict[str, Kind[Any]] = {
    "int": WHOLE,
    "float": NUMBER,
    "str": TEXT,
    "bool": SWITCH,
    "tuple[int, ...]": list_of(WHOLE),
    "tuple[str, ...]": list_of(TEXT),
}
"""Kinds by the annotation of a field."""


def must(accepts: Callable[[Any], object], words: str) -> Rule:
    """Return the rule that ``accepts`` is true, which ``words`` say."""
    return lambda value: None if accepts(value) else words


def at_least(least: int, most: int = MAX_WHOLE) -> Rule:
    """Return the rule for whole numbers from ``least`` to ``most``."""

    def rule(value: int) -> str | None:
        if value < least:
            return f"at least {least}"
        return f"at most {most}" if value > most else None

    return rule


def one_of(known: Collection[str]) -> Rule:
    """Return the rule for names, of which some may be registered later."""
    return lambda name: None if name in known else f"one of {', '.join(known)}"


def _can_be_path(text: str) -> bool:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half a character, as JSON can spell it
        return False
    return bool(encoded) and b"\0" not in encoded


FOLDER: Rule = must(_can_be_path, "the name of a folder")
