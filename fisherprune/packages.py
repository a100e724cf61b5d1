"""Packages that are needed for a part of what there is."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from fisherprune.errors import FisherpruneError


def required(module: str, need: str, remedy: str) -> ModuleType:
    """Return a module of another package.

    Raises:
        FisherpruneError: where it can't be imported: ``NEED, but REASON; REMEDY``.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # of compiled parts that don't fit
        raise FisherpruneError(f"{need}, but {error}; {remedy}") from error


def torchvision_for(what: str, part: str) -> ModuleType:
    """Return a part of torchvision, which ``what`` needs.

    Raises:
        FisherpruneError: where it can't be imported.
    """
    import torch

    return required(
        f"torchvision.{part}",
        f"{what}: torchvision must load beside torch {torch.__version__}",
        "install the torchvision of the same release and build",
    )
