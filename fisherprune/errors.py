"""The one exception of this package, and how its messages show a value."""


class FisherpruneError(ValueError):
    """A mistake in the arguments; the message says what was required and what came."""


def shown(value: object) -> str:
    """Return what came, in at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."
