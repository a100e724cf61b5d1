"""What statistics passes can be told, beside the model and the data."""

from __future__ import annotations

from dataclasses import dataclass

from fisherprune.errors import FieldError, shown

LABELS = ("given", "sampled")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What passes over the data can be told; each pass reads its own.

    Attributes:
        labels: of the squared gradients F: "given" by the data, or "sampled" from the
            model, see ``gradient_moments``. The mean gradient m is that of given ones.
        draws: of sampled labels, one where it is None; and of the Gauss-Newton
            diagonal H, which is exact where it is None, see ``gauss_newton_estimate``.
        probes: of the Hessian's diagonal D, see ``hutchinson_diagonal``.

    Raises:
        FisherpruneError: where a value is not what its field takes.
    """

    labels: str = "given"
    draws: int | None = None
    probes: int = 10

    def __post_init__(self) -> None:
        """Check each value."""
        if self.labels not in LABELS:
            raise FieldError("labels", "'given' or 'sampled'", shown(self.labels))
        if self.draws is not None:
            checked_number("draws", self.draws)
        checked_number("probes", self.probes)


def checked_number(name: str, value: object, least: int = 1) -> int:
    """Return a whole number that is large enough.

    Raises:
        FisherpruneError: where it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FieldError(name, f"an integer of at least {least}", shown(value))
    return value


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
