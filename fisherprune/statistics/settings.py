"""What statistics passes can be told, beside the model and the data."""

from __future__ import annotations

from dataclasses import dataclass

from fisherprune.errors import FieldError, shown


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What passes over the data can be told; each pass reads its own.

    Raises:
        FisherpruneError: where a value is not what its field takes.
    """


def checked_settings(settings: Settings | None) -> Settings:
    """Return ``settings``, or all defaults.

    Raises:
        FisherpruneError: where it is something else.
    """
    if settings is None:
        return Settings()
    if not isinstance(settings, Settings):
        wanted = "fisherprune.Settings(...)"
        raise FieldError("settings", wanted, shown(settings))
    return settings
