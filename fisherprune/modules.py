"""Modules whose weights are pruned, and the classifier, whose weight is not."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fisherprune.errors import FieldError, FisherpruneError, FisherpruneWarning, shown

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Modules that have one weight, and are pruned by default."""


TRANSPOSED: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules whose weight is [in, out, ...]."""


def transposed_kinds() -> tuple[type[nn.Module], ...]:
    """Return ``TRANSPOSED``, and Hugging Face's ``Conv1D`` where it is in use."""
    return TRANSPOSED + layer_kinds()[len(LAYERS) :]


def layer_kinds() -> tuple[type[nn.Module], ...]:
    """Return ``LAYERS`` and Hugging Face's ``Conv1D``, a Linear, where it is in use."""
    theirs = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return LAYERS if theirs is None else (*LAYERS, theirs)


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a model's modules with the names they have where it is not wrapped."""
    inside = wrapped(model)
    return [(without(name, inside), m) for name, m in model.named_modules()]


def wrapped(model: nn.Module) -> set[str]:
    """Return the paths at which ``torch.compile`` and wrappers hold a model."""
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel):
            inside.add(f"{name}.module".lstrip("."))
        elif "_orig_mod" in module._modules:
            inside.add(f"{name}._orig_mod".lstrip("."))
    return inside


def without(name: str, inside: set[str]) -> str:
    """Leave out the components of a name at which the paths ``inside`` end."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return ".".join(
        p for p, path in zip(parts, paths, strict=True) if path not in inside
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model in ``torch.compile`` and in wrappers for several devices."""
    while isinstance(model, DataParallel | DistributedDataParallel) or (
        "_orig_mod" in model._modules
    ):
        model = next(model.children())
    return model


def classifier_of(model: nn.Module) -> nn.Module | None:
    """Return the module that makes a model's outputs, its weights not to be pruned.

    That is what the model's ``get_output_embeddings()`` returns, as language models of
    Hugging Face have it; otherwise the last Linear whose weight is an embedding's;
    otherwise the last Linear, if there is one.
    """
    model = unwrapped(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        return head
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    words = {id(p) for m in model.modules() if is_embedding(m) for p in m.parameters()}
    tied = [m for m in linear if id(m._parameters.get("weight")) in words]
    return next(reversed(tied or linear), None)


def is_embedding(module: nn.Module) -> bool:
    """Return whether it is an embedding of torch."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def checked_kinds(modules: object, model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the classes of modules that were asked for.

    Raises:
        FisherpruneError: where there are none, or the model has no module of any.
    """
    several = isinstance(modules, Iterable) and not isinstance(modules, type)
    given = tuple(modules) if several else (modules,)  # type: ignore[arg-type]
    kinds = tuple(k for k in given if isinstance(k, type) and issubclass(k, nn.Module))
    if len(kinds) < len(given) or not kinds:
        wanted = "classes of modules, such as (nn.Linear, nn.LSTM)"
        raise FieldError("prunable_parameters: modules", wanted, shown(modules))
    missing = [k for k in kinds if not any(isinstance(m, k) for m in model.modules())]
    if missing:
        names = ", ".join(kind.__name__ for kind in missing)
        message = f"prunable_parameters: no module of the model is one of {names}"
        if len(missing) == len(kinds):
            raise FisherpruneError(message)
        warnings.warn(message, FisherpruneWarning, stacklevel=2)
    return kinds


def weights_of(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    head: nn.Module | None,
    skip: Sequence[str],
) -> set[int]:
    """Return the ids of the weights of modules of some kinds, but for the head's.

    Raises:
        FisherpruneError: where one is computed, in a module whose name is not skipped.
    """
    left_out = set() if head is None else set(head.modules())
    return {
        id(p)
        for name, module in named_modules(model)
        if isinstance(module, kinds) and module not in left_out
        if not any(part in f"{name}." for part in skip)
        for p in _own_weights(name, module)
    }


def _own_weights(name: str, module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters but for biases, those within it not counted.

    Raises:
        FisherpruneError: where a weight is computed from other parameters.
    """
    # Not ``module.weight``: reading a computed one computes it and may change buffers.
    own, computed = dict(module._parameters), "parametrizations" in module._modules
    if isinstance(module, layer_kinds()):
        own = {"weight": own.get("weight")}
        computed = own["weight"] is None
    if computed:
        raise FisherpruneError(
            f"prunable_parameters: the weight of {name!r} must be a parameter of that "
            f"{type(module).__name__}, got one computed from others: choose yourself, "
            "by skip=(...) or parameters={name: parameter, ...}"
        )
    return [p for n, p in own.items() if p is not None and "bias" not in n]


@torch.no_grad()  # a copy of TorchScript would hold a graph
def copied(op: str, model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        FisherpruneError: where it can't be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise FisherpruneError(
            f"{op}: the model must be one that can be copied, but copy.deepcopy(model) "
            f"fails: {f'{error}'.partition('. ')[0]}: remove weight_norm and "
            "torch.nn.utils.prune, and attributes that hold a graph"
        ) from error
