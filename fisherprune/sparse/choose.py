"""Which layers of a model become sparse; all that can be wrong is found here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.masks.apply import pruned_weights
from fisherprune.masks.checks import checked_masks
from fisherprune.modules import layer_kinds, unwrapped
from fisherprune.ops.autocast import images_dtype
from fisherprune.parameters import (
    check_shapes_known,
    checked_model,
    fitted_names,
    plain_parameters,
)
from fisherprune.shards import any_shard
from fisherprune.sparse.base import LIMIT
from fisherprune.sparse.cost import pays
from fisherprune.sparse.layers import KINDS
from fisherprune.sparse.optimizers import sparse_layers


@dataclass
class Chosen:
    """A layer that becomes sparse."""

    name: str
    """Of its weight, as the masks call it."""
    module: nn.Module
    mask: Tensor
    """On the weight's device."""


@dataclass
class Choice:
    """What becomes of the masks."""

    layers: list[Chosen]
    dense: dict[str, Tensor]
    """Masks of parameters that stay dense."""


def choose(
    model: nn.Module, masks: Mapping[str, Tensor], dense_above: float | None
) -> Choice:
    """Return which layers become sparse, and the masks of parameters that do not.

    Raises:
        FisherpruneError: where ``compress`` says so.
    """
    _check_model(model)
    _check_threshold(dense_above)
    masks = checked_masks(masks, "compress")
    _check_computed(model, masks)
    pairs = pruned_weights(masks, model)
    owners = _owners(model)
    choice = Choice([], {})
    for name, (weight, pruned) in pairs.items():
        _check_weight(name, weight)
        module = _layer_of(owners[id(weight)])
        if module is None or not _is_sparse(module, pruned, dense_above):
            choice.dense[name] = masks[name]
            continue
        _check_alone(name, weight, owners[id(weight)])
        choice.layers.append(Chosen(name, module, ~pruned))
    return choice


def _check_model(model: nn.Module) -> None:
    checked_model(model)
    check_shapes_known(model)
    for name, layer in sparse_layers(model):
        raise FisherpruneError(
            f"compress: the model must be dense, but {name!r} is a "
            f"{type(layer).__name__} already: decompress it first"
        )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            kind = type(module).__name__
            raise FieldError("compress: model", "compressed before it is wrapped", kind)
    if any_shard(model.parameters()):
        raise FieldError("compress: parameters", "whole", "some in shards")
    if type(unwrapped(model)) in KINDS:
        wanted = "a module that has its layers inside, nn.Sequential(layer) say"
        raise FieldError(
            "compress: model", wanted, f"a {type(unwrapped(model)).__name__} itself"
        )


def _check_threshold(dense_above: float | None) -> None:
    if dense_above is None:
        return
    number = isinstance(dense_above, int | float) and not isinstance(dense_above, bool)
    if not (number and 0 <= dense_above <= 1):
        wanted = "a density from 0 to 1, or None"
        raise FieldError("compress: dense_above", wanted, shown(dense_above))


def _check_computed(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks of layers whose weight is computed, or quantized.

    They may be named after the weight, which is no parameter, or after what it is
    computed from.
    """
    named = plain_parameters(model)
    fitted = fitted_names(masks, named) or {}
    modules = dict(model.named_modules())
    for name in masks:
        path = fitted.get(name, name).partition(".parametrizations.")[0]
        module = modules.get(path) or modules.get(path.rpartition(".")[0])
        if module is None or module is model:
            continue
        if type(module).__module__.startswith("torch.ao."):
            kind = f"a {type(module).__name__} of {type(module).__module__}"
            raise FieldError(f"compress: {name!r}", "of a layer not quantized", kind)
        computed = isinstance(module, layer_kinds()) and (
            "weight" not in module._parameters
        )
        if computed or isinstance(module, ParametrizationList):
            raise FisherpruneError(
                f"compress: the weight of {name!r} must be a parameter of its layer, "
                "got one computed from others (parametrization, weight_norm, "
                "torch.nn.utils.prune): make it a parameter first"
            )


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that have a parameter, and what they call it, by its id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return owners


def _layer_of(owners: list[tuple[nn.Module, str]]) -> nn.Module | None:
    """Return the layer whose weight it is, if there is a sparse layer of its kind."""
    for module, name in owners:
        zeros = getattr(module, "padding_mode", "zeros") == "zeros"
        if name == "weight" and type(module) in KINDS and zeros:
            return module
    return None


def _is_sparse(module: nn.Module, pruned: Tensor, dense_above: float | None) -> bool:
    total = pruned.numel()
    if not 0 < total < LIMIT:
        return False
    density = 1 - int(pruned.count_nonzero()) / total
    if dense_above is not None:
        return density <= dense_above
    return pays(module, density, images_dtype(pruned.device.type) or torch.float32)


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if not weight.is_floating_point():
        wanted = "of floating-point numbers"
        raise FieldError(f"compress: {name!r}", wanted, weight.dtype)
    if weight.is_meta:
        raise FieldError(f"compress: {name!r}", "with values", "one on the meta device")
    if weight.layout != torch.strided:
        raise FieldError(f"compress: {name!r}", "a dense tensor", weight.layout)


def _check_alone(
    name: str, weight: nn.Parameter, owners: list[tuple[nn.Module, str]]
) -> None:
    """Refuse a weight that others use, too, or whose gradient has hooks."""
    if len(owners) > 1:
        kinds = " and ".join(type(module).__name__ for module, _ in owners)
        wanted = "the parameter of one layer"
        raise FieldError(f"compress: {name!r}", wanted, f"one tied between {kinds}")
    if weight._backward_hooks:
        wanted = "without a gradient hook (register_hook)"
        raise FieldError(f"compress: {name!r}", wanted, "one that has some")
