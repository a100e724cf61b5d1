"""The exceptions of this package, and how their messages show a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FisherpruneError(ValueError):
    """A mistake in the arguments; the message says what was required and what came."""


class FisherpruneWarning(UserWarning):
    """Something that is allowed and seldom meant; ``warnings`` can silence it."""


class LayerCollapseWarning(FisherpruneWarning):
    """Masks keep no weight of a layer: nothing passes through it any more."""


class FieldError(FisherpruneError):
    """A value that a field can't have: ``FIELD must be WANTED, got GOT``.

    Attributes:
        field: name of the field, or its place in a file.
        wanted: what the value must be.
        got: what came, as the message shows it.
    """

    def __init__(self, field: str, wanted: str, got: object) -> None:
        super().__init__(f"{field} must be {wanted}, got {got}")
        self.field, self.wanted, self.got = field, wanted, got

    def at(self, place: str) -> FieldError:
        """Return the same error of the field that is called ``place``."""
        return FieldError(place, self.wanted, self.got)

    def __reduce__(self) -> tuple[type, tuple[str, str, object]]:
        return type(self), (self.field, self.wanted, self.got)


def shown(value: object) -> str:
    """Return what came, in at most 60 characters of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        text = f"{type(value).__name__} too large to show"
    if "\n" in text:  # tensors
        text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def near(name: str, known: Iterable[str]) -> str:
    """Return a remark that asks whether the closest of the known names is meant."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
