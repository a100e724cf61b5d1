"""Parameters by name: those to prune, and checks whether a pass can use them."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fisherprune.errors import FieldError, FisherpruneError, FisherpruneWarning, shown

Parameters = dict[str, nn.Parameter]

WRAPPERS = ("_orig_mod", "module")
"""What wrappers of a model call it: torch.compile, and those for several devices."""


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
            once and of real floating-point numbers.
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
    if not parameter.is_floating_point():
        raise FieldError(
            f"parameters: {name!r}", "of floating-point numbers", parameter.dtype
        )


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


def plain_parameters(model: nn.Module) -> Parameters:
    """Return a model's parameters by the names that they have where it is not wrapped.

    ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put components
    ``_orig_mod`` and ``module`` into the names, which are left out here.
    """
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel):
            inside.add(f"{name}.module".lstrip("."))
        elif "_orig_mod" in module._modules:
            inside.add(f"{name}._orig_mod".lstrip("."))
    named = dict(model.named_parameters())
    plain = (
        {_without(name, inside): p for name, p in named.items()} if inside else named
    )
    return plain if len(plain) == len(named) else named


def _without(name: str, inside: set[str]) -> str:
    """Leave out the components of a name at which the paths ``inside`` end."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return ".".join(
        p for p, path in zip(parts, paths, strict=True) if path not in inside
    )


def fitted_names(names: Iterable[str], own: Iterable[str]) -> dict[str, str] | None:
    """Return the own name of each name; None where one has none.

    The names are compared as they are, then without what wrappers put into them: the
    component ``_orig_mod`` anywhere, and each leading ``module`` that all names have.
    """
    names, own = list(names), list(own)
    for mine in _unwrapped(own):
        found = dict(zip(mine, own, strict=True))
        for theirs in _unwrapped(names):
            if all(name in found for name in theirs):
                return {n: found[t] for n, t in zip(names, theirs, strict=True)}
    return None


def _unwrapped(names: list[str]) -> Iterator[list[str]]:
    yield names
    parts = [[part for part in n.split(".") if part != "_orig_mod"] for n in names]
    if any("_orig_mod" in name for name in names):
        yield [".".join(p) for p in parts]
    while parts and all(len(p) > 1 and p[0] == "module" for p in parts):
        parts = [p[1:] for p in parts]
        yield [".".join(p) for p in parts]


def prunable_parameters(
    model: nn.Module, skip: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return the parameters to prune, by name, in ``named_parameters()`` order.

    Frozen parameters (``requires_grad`` False) are never chosen: they are not trained
    and have no gradient that could score them. Names are those of the model that
    ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` wraps.

    The choice does not depend on a criterion. So it has the weights of Conv3d, which
    data-free criteria score; the others refuse them, naming the parameter, unless
    ``register_layer`` has made the gradients of ``F.conv3d`` known.

    Args:
        model: any module.
        skip: by default the weights of Conv and Linear modules are chosen except the
            classifier's (the last Linear). So other weights are not, of attention, of
            recurrent layers or of experts in one tensor of three dimensions; a
            ``FisherpruneWarning`` says so where they are more than half, embeddings
            and the classifier not counted. With name parts to skip, all parameters
            whose names contain none of them: ``skip=("bias", "linear", "bn")`` is the
            choice of the published FTS code, which also prunes the BatchNorm weights
            inside of ``shortcut``. A part that no name contains is a
            ``FisherpruneWarning`` while others are in some.

    Raises:
        FisherpruneError: where nothing is left to prune, or no name contains any part
            of ``skip``; by default also where a weight is computed from other
            parameters (``weight_norm``, ``spectral_norm``, ``torch.nn.utils.prune``):
            which of those to prune only you can say.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> list(prunable_parameters(net))
        ['0.weight']
        >>> list(prunable_parameters(net, skip=["bias"]))
        ['0.weight', '2.weight']
    """
    named = plain_parameters(checked_model(model))
    if skip is None:
        found = _of_layers(model, named)
    else:
        parts = _checked_parts(skip, named)
        found = {n: p for n, p in named.items() if not any(part in n for part in parts)}
    chosen = {name: p for name, p in found.items() if p.requires_grad}
    if not chosen:
        frozen = f"; {len(found)} are frozen: unfreeze some" if found else ""
        raise FisherpruneError(
            f"prunable_parameters: {type(model).__name__} has no prunable parameters "
            f"among its {len(named)} (skip={skip!r}){frozen}"
        )
    return chosen


def checked_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is a module.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(model, nn.Module):
        raise FieldError("model", "a torch.nn.Module", type(model).__name__)
    return model


def _checked_parts(skip: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    several = isinstance(skip, Iterable) and not isinstance(skip, str | Tensor)
    given: tuple[object, ...] = tuple(skip) if several else (skip,)
    parts = tuple(part for part in given if isinstance(part, str))
    if len(parts) < len(given):
        wanted = "parts of parameters' names"
        raise FieldError("prunable_parameters: skip", wanted, shown(skip))
    unknown = [part for part in parts if not any(part in name for name in names)]
    if unknown:
        odd = ", ".join(f"{part!r}{_nearest(part, names)}" for part in unknown)
        message = f"prunable_parameters: no parameter's name contains {odd}"
        if len(unknown) == len(parts):
            raise FisherpruneError(f"{message}; skip=() chooses all parameters")
        warnings.warn(f"{message}: it skips nothing", FisherpruneWarning, stacklevel=2)
    return parts


def _nearest(part: str, names: Iterable[str]) -> str:
    """Say which part of a name is most like a mistyped one, if one is like it."""
    known = {known for name in names for known in (name, *name.split("."))}
    near = difflib.get_close_matches(part, sorted(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _of_layers(model: nn.Module, named: Parameters) -> Parameters:
    """Return the weights of Conv and Linear modules but for the last Linear's."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    linear = [m for _, m in layers if isinstance(m, nn.Linear)]
    classifier = linear[-1] if linear else None
    chosen = {id(_own_weight(n, m)) for n, m in layers if m is not classifier}
    known = set(chosen)
    for module in model.modules():
        if module is classifier or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            known |= {id(p) for p in module.parameters()}
    _warn_of_others(
        model, {n: p for n, p in named.items() if id(p) not in known}, chosen
    )
    return {name: p for name, p in named.items() if id(p) in chosen}


def _warn_of_others(model: nn.Module, others: Parameters, chosen: set[int]) -> None:
    """Warn where most weights are not chosen: other kinds of modules own them."""
    others = {n: p for n, p in others.items() if p.dim() > 1 and p.requires_grad}
    left = sum(p.numel() for p in others.values())
    covered = sum(p.numel() for p in model.parameters() if id(p) in chosen)
    if chosen and covered < left:
        largest = sorted(others, key=lambda name: -others[name].numel())[:3]
        owners = (f"{name!r} ({owner(model, others[name])})" for name in largest)
        warnings.warn(
            f"prunable_parameters: {covered / (covered + left):.0%} of the weights are "
            f"chosen, those of Conv and Linear modules; not chosen: {', '.join(owners)}"
            f"{', ...' if len(others) > 3 else ''}: choose by skip=(...) or "
            "parameters={name: parameter, ...}",
            FisherpruneWarning,
            stacklevel=2,
        )


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
