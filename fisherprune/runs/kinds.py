"""What the values of a configuration must be: in words, as a test, and made alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words, as a test, and what is made of it."""

    words: str
    accepts: Callable[[object], bool]
    convert: Callable[[object], object] = lambda value: value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    fits = _is_whole(value) and value.bit_length() < 1024  # what float() can take
    return fits or isinstance(value, float)


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists of a kind; they become tuples."""
    words = kind.words.removeprefix("a ")
    return Kind(
        f"a list of {words}s",
        lambda value: isinstance(value, list | tuple) and all(map(kind.accepts, value)),
        lambda value: tuple(map(kind.convert, value)),
    )


NUMBER = Kind("a number", _is_number, float)
WHOLE = Kind("a whole number", _is_whole)
TEXT = Kind("a string", lambda value: isinstance(value, str))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
KINDS = {
    "int": WHOLE,
    "float": NUMBER,
    "str": TEXT,
    "bool": SWITCH,
    "tuple[int, ...]": list_of(WHOLE),
    "tuple[str, ...]": list_of(TEXT),
}
"""Kinds by the annotation of a field."""
