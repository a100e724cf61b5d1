"""What statistics passes can be told, beside the model and the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fisherprune.errors import FieldError, shown

FLOWS = ("trainable", "weights", "scored")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What passes over the data can be told; each pass reads its own.

    Attributes:
        flow: of grasp, the parameters of whose gradient the flow is: "trainable", all
            that have ``requires_grad``, as in the published FTS code; "weights", those
            of Conv and Linear layers, the classifier's too, as in the published GraSP
            code; "scored", none but those scored. These are always among them.
        temperature: of grasp, what the outputs are divided by before the loss: 200 in
            the paper's code and in Synaptic-Flow's, 1 in the published FTS code.

    Raises:
        FisherpruneError: where a value is not what its field takes.
    """

    flow: str = "trainable"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check every field by itself."""
        if self.flow not in FLOWS:
            raise FieldError("flow", f"one of {', '.join(FLOWS)}", shown(self.flow))
        _check_number("temperature", self.temperature, above=0)


def _check_number(name: str, value: object, *, above: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < math.inf:  # type: ignore[operator]
        raise FieldError(name, f"a number above {above}", shown(value))


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
