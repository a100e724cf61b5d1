"""One model and the data that it is tried with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Losses = Callable[[Any, Any], Tensor]
SAMPLES = 2
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model of a library.

    Attributes:
        library: it is from.
        family: of models that share their layers.
        name: of the model.
        make: returns it and a batch of ``SAMPLES``, of any structure.
        losses: ``(model, batch) -> [N]``.
    """

    library: str
    family: str
    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    losses: Losses
