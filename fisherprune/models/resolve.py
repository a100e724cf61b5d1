"""Networks by name: ours, torchvision's, and those that a user's function builds."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from fisherprune.errors import FieldError, FisherpruneError, near, shown
from fisherprune.models.registry import MODELS, Builder
from fisherprune.packages import torchvision_for

TORCHVISION = "torchvision:"
IDENTIFIERS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
ARGUMENTS = "num_classes, and as far as it uses them in_channels and image_size"


def check_name(name: str) -> None:
    """Refuse what can't be the name of a network; nothing of the user's is imported.

    Raises:
        FieldError: where it is neither a key of ``MODELS`` nor of the form
            torchvision:NAME, MODULE:FUNCTION or FILE.py:FUNCTION.
    """
    known = list(MODELS)
    if name.startswith(TORCHVISION):
        known += [TORCHVISION + each for each in _torchvision_names()]
        if len(known) == len(MODELS):  # torchvision does not load: create() says why
            return
    elif _is_users(name):
        return
    if name not in known:
        words = f"one of {', '.join(MODELS)}, torchvision:NAME, MODULE:FUNCTION or "
        got = f"{shown(name)}{near(name, known)}"
        raise FieldError("model", f"{words}FILE.py:FUNCTION", got)


def _is_users(name: str) -> bool:
    place, _, function = name.rpartition(":")
    is_place = place.endswith(".py") or IDENTIFIERS.fullmatch(place)
    return bool(is_place and function.isidentifier())


@cache
def _torchvision_names() -> tuple[str, ...]:
    """Return torchvision's networks for classification, none if it does not load."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError):
        return ()
    return tuple(models.list_models(module=models))


def source_hash(name: str) -> str | None:
    """Return 16 hex digits of the SHA-256 of the file that defines a user's function.

    None for our networks and torchvision's.

    Raises:
        FisherpruneError: where the function can't be imported.
    """
    if name.startswith(TORCHVISION) or not _is_users(name):
        return None
    with _importable(name):
        function, module = _function(name)
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that can be called
        path = None
    path = path or module.__file__
    if path is None:
        raise FieldError("model", "a function of a source file", shown(name))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def build(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build a network of torchvision's or the user's.

    Raises:
        FisherpruneError: where that fails, one line for whatever the function raises.
    """
    sizes = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
    }
    if name.startswith(TORCHVISION):
        return _called(name, _torchvision(name, in_channels, sizes), {})
    with _importable(name):
        function, _ = _function(name)
        return _called(name, function, _accepted(name, function, sizes))


def _torchvision(name: str, in_channels: int, sizes: dict[str, int]) -> Builder:
    """Return what builds a network of torchvision's, without auxiliary outputs."""
    models = torchvision_for(f"model {name}", "models")
    if in_channels != 3:
        wanted = f"a network for images of {in_channels} channels; torchvision's take 3"
        raise FieldError("model", wanted, name)
    builder = models.get_model_builder(name.removeprefix(TORCHVISION))
    network = inspect.signature(builder, eval_str=True).return_annotation
    size = sizes["image_size"]
    options = {
        "num_classes": sizes["num_classes"],
        "aux_logits": False,
        "init_weights": True,
        "image_size": size,
        "input_size": (size, size),
    }
    known = {"num_classes", *inspect.signature(network).parameters}
    chosen = {key: value for key, value in options.items() if key in known}
    return lambda: builder(weights=None, **chosen)


@contextmanager
def _importable(name: str) -> Iterator[None]:
    """Import from the folder of the user's file first, else from the current one."""
    place = name.rpartition(":")[0]
    folder = os.path.dirname(place) if place.endswith(".py") else ""
    before = list(sys.path)
    sys.path.insert(0, os.path.abspath(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _function(name: str) -> tuple[Builder, ModuleType]:
    """Return the function that a name means, and the module it was found in."""
    place, _, function = name.rpartition(":")
    try:
        module = _file(place) if place.endswith(".py") else _module(place)
    except Exception as error:
        got = f"{name}: {_reason(error)}"
        raise FieldError("model", "a function that can be imported", got) from error
    if not callable(found := getattr(module, function, None)):
        known = [key for key, value in vars(module).items() if callable(value)]
        got = f"{name}{near(function, known)}"
        raise FieldError("model", f"a function of {place}", got)
    return found, module


def _module(place: str) -> ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(place)


def _file(place: str) -> ModuleType:
    """Run a file as a module of its own; each time anew: it may have changed."""
    path = Path(place).resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    spec = spec_from_file_location(f"{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _accepted(name: str, function: Builder, sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes that a function takes by keyword; one it must take."""
    wanted = f"a function with the keyword arguments {ARGUMENTS}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise FieldError("model", wanted, name) from None
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named |= {*sizes}
    if "num_classes" not in named:
        raise FieldError("model", wanted, f"{name}{signature}")
    return {key: value for key, value in sizes.items() if key in named}


def _called(name: str, function: Builder, sizes: dict[str, int]) -> nn.Module:
    try:
        network = function(**sizes)
    except Exception as error:
        raise FisherpruneError(f"model {name} raised {_reason(error)}") from error
    if not isinstance(network, nn.Module):
        wanted = "a function that returns a torch.nn.Module"
        got = f"{name}, which returned {shown(network)}"
        raise FieldError("model", wanted, got)
    return network


def _reason(error: Exception) -> str:
    """Return an exception in one line, with the line of the source that raised it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({file}, line {line})" if os.path.isfile(file) else text


@torch.no_grad()
def check_outputs(
    name: str, network: nn.Module, num_classes: int, in_channels: int, image_size: int
) -> None:
    """Refuse a network that does not map images to logits, whether in training or not.

    Raises:
        FisherpruneError: naming what it returned or raised.
    """
    images = torch.zeros(2, in_channels, image_size, image_size)
    wanted = (
        f"model {name} must map images {list(images.shape)} to a tensor of logits "
        f"{[2, num_classes]}"
    )
    for training in (False, True):  # it ends in training mode
        network.train(training)
        before = [(buffer, buffer.clone()) for buffer in network.buffers()]
        try:
            found = network(images)
        except Exception as error:
            raise FisherpruneError(f"{wanted}; it raised {_reason(error)}") from error
        if not isinstance(found, Tensor) or found.shape != (2, num_classes):
            is_tensor = isinstance(found, Tensor)
            got = list(found.shape) if is_tensor else type(found).__name__
            raise FisherpruneError(f"{wanted}, got {got}")
    for buffer, value in before:
        buffer.copy_(value)
