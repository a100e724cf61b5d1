"""Densities of layers: the share of the weights that each of them keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fisherprune.errors import FisherpruneError
from fisherprune.masks import Masks


def read_densities(path: str | Path) -> dict[str, float]:
    """Read densities by parameter name.

    Args:
        path: a JSON file ``{"PARAMETER": NUMBER, ...}``, or masks that ``Masks.save``
            wrote (``*.safetensors``), whose densities are taken.

    Raises:
        FisherpruneError: where the file is missing or holds neither.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Masks.load(path).density()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FisherpruneError(
            f"densities must be in a file that can be read, got {path}: "
            f"{error.strerror}"
        ) from None
    except ValueError as error:
        raise FisherpruneError(f"densities file {path} is no JSON: {error}") from None
    return checked_densities(content, f"densities of {path}")


def checked_densities(content: object, name: str = "densities") -> dict[str, float]:
    """Return ``content`` if it maps parameter names to finite numbers, 0 or more.

    Raises:
        FisherpruneError: where it does not; the message begins with ``name``.
    """
    if not isinstance(content, dict) or not content:
        raise FisherpruneError(f"{name} must map parameter names to numbers")
    for key, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise FisherpruneError(
                f"{name} must be finite numbers of at least 0, got {value!r} for "
                f"{key!r}"
            )
    return {str(key): float(value) for key, value in content.items()}
