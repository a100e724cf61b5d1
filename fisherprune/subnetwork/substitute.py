"""A model run with other values in place of its parameters, which stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.apply import pruned_weights
from fisherprune.masks.checks import checked_masks
from fisherprune.parameters import checked_model, eager
from fisherprune.shards import check_whole
from fisherprune.statistics.structure import described, map_tensors, tensors_in

Values = Mapping[int, Tensor]
"""By the id of a parameter or buffer."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of ``torch.compile`` and wrappers for several devices.

    Raises:
        FisherpruneError: where it is no module.
    """
    model = eager(checked_model(model))
    while isinstance(model, DataParallel | DistributedDataParallel):
        model = eager(model.module)
    return model


def checked_example(example: object, function: str) -> object:
    """Return ``example`` if a tensor is in it.

    Raises:
        FisherpruneError: where there is none; the message begins with ``function``.
    """
    if not tensors_in(example):
        wanted = "a tensor, or a tuple or dictionary that holds one"
        raise FieldError(f"{function}: example", wanted, described(example))
    return example


def masked_parameters(
    masks: Mapping[str, Tensor], model: nn.Module, function: str
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Pair the model's parameters with their masks, by the name that masks give them.

    Raises:
        FisherpruneError: where the masks are none or do not fit.
    """
    instead = "of the same model before it is split, with masks.whole()"
    check_whole(f"{function}: parameters", instead, dict(model.named_parameters()))
    pairs = pruned_weights(checked_masks(masks, function), model)
    return {name: (weight, ~pruned) for name, (weight, pruned) in pairs.items()}


def named_tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def run_with(
    model: nn.Module,
    values: Values,
    example: object,
    change: Callable[[Tensor], Tensor],
    wanted: str,
) -> object:
    """Return what the model computes with other values.

    Args:
        model: not wrapped, in eval mode.
        values: of the parameters and buffers that have others.
        example: a tensor, a tuple of arguments or a dictionary of keyword arguments.
        change: makes an argument of each of its tensors.
        wanted: what the model must do, as the error begins.

    Raises:
        FisherpruneError: where the model raises anything.
    """
    named = named_tensors_of(model).items()
    others = {name: values[id(t)] for name, t in named if id(t) in values}
    given: Any = map_tensors(lambda t: change(t.detach().clone()), example)
    args: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
    kwargs: dict[str, Any] = {}
    if isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    try:
        return functional_call(model, others, args, kwargs, tie_weights=False)
    except FisherpruneError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {shown(str(error))}"
        raise FisherpruneError(f"{wanted}, got {got}") from error


def floating(tensor: Tensor) -> bool:
    """Return whether it holds real floating-point numbers, on a device."""
    return torch.is_floating_point(tensor) and not tensor.is_meta
