"""The one exception of this package."""


class FisherpruneError(ValueError):
    """A mistake in the arguments; the message says what was required and what came."""
