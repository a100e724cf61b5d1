"""The one exception of this package, and how its messages show a value."""


class FisherpruneError(ValueError):
    """A mistake in the arguments; the message says what was required and what came."""


def shown(value: object) -> str:
    """Return what came, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
