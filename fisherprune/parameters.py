"""Parameters by name: those to prune, and checks whether a pass can use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherprune.errors import FieldError, FisherpruneError, shown

Parameters = dict[str, nn.Parameter]


def eager(model: nn.Module) -> nn.Module:
    """Return the module below ``torch.compile``: compiled code can't be tapped."""
    return getattr(model, "_orig_mod", model)


def device_of(parameters: Parameters) -> torch.device:
    """Return the device of the first parameter."""
    return next(iter(parameters.values())).device


def checked_parameters(model: nn.Module, parameters: Parameters | None) -> Parameters:
    """Return ``parameters``, or the prunable ones, checked to be usable.

    Raises:
        FisherpruneError: where the model is no module or has lazy layers that never
            ran, or ``parameters`` is no dict of parameters of the model, each of them
            once, float32 and not frozen.
    """
    _check_shapes_known(checked_model(model))
    if parameters is None:
        parameters = prunable_parameters(model)
    if not isinstance(parameters, Mapping):
        raise FieldError(
            "parameters",
            "a dict of the model's parameters by name, as prunable_parameters returns",
            type(parameters).__name__,
        )
    if not parameters:
        raise FisherpruneError("parameters must name at least one parameter")
    own, names = {id(p) for p in model.parameters()}, dict[int, str]()
    for name, p in parameters.items():
        if id(p) not in own:
            raise FisherpruneError(f"parameters: {name!r} is no parameter of the model")
        first = names.setdefault(id(p), name)
        if first != name:
            raise FisherpruneError(
                f"parameters: {first!r} and {name!r} are one parameter: leave one out"
            )
        _check_usable(name, p)
    return dict(parameters)


def _check_shapes_known(model: nn.Module) -> None:
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if is_lazy(tensor):
                raise FisherpruneError(
                    f"model must have run once, so that its lazy layers have shapes: "
                    f"{name!r} has none yet"
                )


def _check_usable(name: str, parameter: nn.Parameter) -> None:
    if not parameter.requires_grad:
        raise FisherpruneError(
            f"parameters: {name!r} is frozen (requires_grad=False): unfreeze it or "
            "leave it out"
        )
    if parameter.dtype != torch.float32:
        raise FieldError(f"parameters: {name!r}", "float32", parameter.dtype)


def check_unhooked(parameters: Parameters) -> None:
    """Raise where a hook would change a parameter's gradient, naming the parameter.

    Hooks that run after the gradient was accumulated, such as those of ``Masks.hold``,
    are allowed: they change the parameter's ``.grad``, which no pass reads.
    """
    for name, parameter in parameters.items():
        if parameter._backward_hooks:
            raise FisherpruneError(
                f"parameters: {name!r} must have no gradient hook (register_hook), "
                "whose changes the gradients of single samples would not show: remove "
                "it for scoring or leave the parameter out"
            )


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise where an entry is NaN or infinite, naming the parameter.

    Reads each tensor once and waits for the device once: where a sum is finite, all its
    entries are. Where it is not, large entries may have overflowed together, so only
    then each entry is looked at.
    """
    sums = [t.sum() for t in tensors.values()]
    total = torch.stack([s.to(sums[0].device) for s in sums])
    for name, ok in zip(tensors, total.isfinite().tolist(), strict=True):
        if not ok and not tensors[name].isfinite().all():
            raise FisherpruneError(f"{what} of {name!r} is NaN or infinite")


def prunable_parameters(
    model: nn.Module, skip: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the parameters to prune, by name, in ``named_parameters()`` order.

    The choice does not depend on a criterion. So it has the weights of Conv3d, which
    data-free criteria score; the others refuse them, naming the parameter, unless
    ``register_layer`` has made the gradients of ``F.conv3d`` known.

    Args:
        model: any module.
        skip: by default the weights of Conv and Linear modules are chosen except the
            classifier's (the last Linear). With name parts to skip, all parameters
            whose names contain none of them: ``skip=("bias", "linear", "bn")`` is the
            choice of the published FTS code, which also prunes the BatchNorm weights
            inside of ``shortcut``.

    Raises:
        FisherpruneError: where nothing is left to prune; by default also where a weight
            is computed from other parameters (``weight_norm``, ``spectral_norm``,
            ``torch.nn.utils.prune``): which of those to prune only you can say.
    """
    named = dict(checked_model(model).named_parameters())
    if skip is None:
        chosen = {id(w) for w in _layer_weights(model)}
        found = {name: p for name, p in named.items() if id(p) in chosen}
    else:
        parts = _checked_parts(skip)
        found = {n: p for n, p in named.items() if not any(part in n for part in parts)}
    if not found:
        raise FisherpruneError(
            f"prunable_parameters: {type(model).__name__} has no prunable parameters "
            f"among its {len(named)} (skip={skip!r})"
        )
    return found


def checked_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is a module.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(model, nn.Module):
        raise FieldError("model", "a torch.nn.Module", type(model).__name__)
    return model


def _checked_parts(skip: Sequence[str]) -> tuple[str, ...]:
    parts = (skip,) if isinstance(skip, str) else skip
    parts = tuple(parts) if isinstance(parts, Iterable) else (parts,)
    if not all(isinstance(part, str) for part in parts):
        wanted = "parts of parameters' names"
        raise FieldError("prunable_parameters: skip", wanted, shown(skip))
    return parts


def _layer_weights(model: nn.Module) -> list[nn.Parameter]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    linear = [m for _, m in layers if isinstance(m, nn.Linear)]
    classifier = linear[-1] if linear else None
    return [_own_weight(name, m) for name, m in layers if m is not classifier]


def _own_weight(name: str, layer: nn.Module) -> nn.Parameter:
    # Not ``layer.weight``: reading a computed one computes it and may change buffers.
    weight = layer._parameters.get("weight")
    if weight is None:
        raise FisherpruneError(
            f"prunable_parameters: the weight of {name!r} must be a parameter of that "
            f"{type(layer).__name__}, got one computed from others: choose yourself, "
            "by skip=(...) or parameters={name: parameter, ...}"
        )
    return weight


def owner(model: nn.Module, parameter: nn.Parameter) -> str:
    """Say whose parameter it is: ``Linear in MultiheadAttention``."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if any(p is parameter for p in module._parameters.values()):
            kind, around = type(module).__name__, modules[name.rpartition(".")[0]]
            return f"{kind} in {type(around).__name__}" if name else kind
    return type(model).__name__
