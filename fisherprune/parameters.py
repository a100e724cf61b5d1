"""Parameters by name: those to prune, and checks whether a pass can use them."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from fisherprune.errors import FieldError, FisherpruneError, FisherpruneWarning, shown
from fisherprune.modules import (
    checked_kinds,
    classifier_of,
    is_embedding,
    layer_kinds,
    named_modules,
    transposed_kinds,
    weights_of,
    without,
    wrapped,
)
from fisherprune.shards import local, mesh_of, settle, summed

Parameters = dict[str, nn.Parameter]

WRAPPERS = ("_orig_mod", "module")
"""What wrappers of a model call it: torch.compile, and those for several devices."""


def eager(model: nn.Module) -> nn.Module:
    """Return the module below ``torch.compile`` and ``DistributedDataParallel``.

    Compiled code can't be tapped, and what ranks send each other in a forward pass
    would wait for ranks that have fewer batches.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


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
    check_shapes_known(checked_model(model))
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


HOLD_TENSORS = "_parameters", "_buffers"
"""Attributes of modules."""


def check_shapes_known(model: nn.Module) -> None:
    """Raise where a lazy layer has no shape yet, naming a parameter or a buffer."""
    every = (m.__dict__[kind] for m in model.modules() for kind in HOLD_TENSORS)
    if not any(is_lazy(tensor) for tensors in every for tensor in tensors.values()):
        return
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
    parts = [local(t) for t in tensors.values()]
    sums = [part.sum() for part in parts]
    finite = torch.stack([s.to(sums[0].device) for s in sums]).isfinite().tolist()
    pairs = zip(finite, parts, strict=True)
    odd = [int(not ok and not part.isfinite().all()) for ok, part in pairs]
    if mesh := mesh_of(tensors.values()):
        odd = summed(torch.tensor(odd), mesh).tolist()
    for name, is_odd in zip(tensors, odd, strict=True):
        if is_odd:
            raise FisherpruneError(f"{what} of {name!r} is NaN or infinite")


def plain_parameters(model: nn.Module) -> Parameters:
    """Return a model's parameters by the names that they have where it is not wrapped.

    ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put components
    ``_orig_mod`` and ``module`` into the names, which are left out here.
    """
    inside = wrapped(model)
    named = dict(model.named_parameters())
    plain = {without(name, inside): p for name, p in named.items()} if inside else named
    return plain if len(plain) == len(named) else named


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
    model: nn.Module,
    skip: Sequence[str] | None = None,
    *,
    modules: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
) -> dict[str, nn.Parameter]:
    """Return the parameters to prune, by name, in ``named_parameters()`` order.

    By default these are the weights of convolutions, transposed ones too, of Linear
    modules and of Hugging Face's ``Conv1D``, except the classifier's. The classifier is
    the module that the model's ``get_output_embeddings()`` returns, as language models
    of Hugging Face have it; otherwise the last Linear whose weight is also an
    embedding's; otherwise the last Linear in the order of ``model.modules()``:
    ``fisherprune.parameters.classifier_name(model)`` is its name.

    Other weights, of attention, of recurrent layers or of experts in one tensor of
    three dimensions, are then not chosen; a ``FisherpruneWarning`` says so where they
    are more than half, embeddings and the classifier not counted: ``modules`` or
    ``skip`` choose them.

    Frozen parameters (``requires_grad`` False) are never chosen: they are not trained
    and have no gradient that could score them. Names are those of the model that
    ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` wraps. The choice
    does not depend on a criterion.

    Args:
        model: any module.
        skip: parts of names. All parameters whose names contain none of them are
            chosen, with ``modules`` those among its weights; the classifier is left out
            where a part says so. ``skip=("bias", "linear", "bn")`` is the choice of the
            published FTS code, which also prunes the BatchNorm weights inside of
            ``shortcut``. A part that no name contains is a ``FisherpruneWarning`` while
            others are in some.
        modules: classes of modules, in place of the default ones, subclasses included.
            Their weights are the parameters of their own but for biases; those of
            modules within them belong to these. Without ``skip``, the classifier is
            left out. A class of which the model has no module is a
            ``FisherpruneWarning`` while it has some of others.

    Raises:
        FisherpruneError: where nothing is left to prune, no name contains any part of
            ``skip``, or no module is of any class of ``modules``; where modules are
            chosen by their class also where a weight is computed from other parameters
            (``weight_norm``, ``spectral_norm``, ``torch.nn.utils.prune``): which of
            those to prune only you can say.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        >>> list(prunable_parameters(net)), classifier_name(net)
        (['0.weight'], '2')
        >>> list(prunable_parameters(net, skip=["bias"]))
        ['0.weight', '1.weight', '2.weight']
        >>> list(prunable_parameters(net, modules=(nn.Linear, nn.LayerNorm)))
        ['0.weight', '1.weight']
        >>> list(prunable_parameters(net, modules=(nn.Linear,), skip=["0."]))
        ['2.weight']
    """
    named = plain_parameters(checked_model(model))
    parts = () if skip is None else _checked_parts(skip, named)
    kinds = None if modules is None else checked_kinds(modules, model)
    head = classifier_of(model) if skip is None else None
    found = {n: p for n, p in named.items() if not any(part in n for part in parts)}
    if skip is None or kinds:
        weights = weights_of(model, kinds or layer_kinds(), head, parts)
        found = {name: p for name, p in found.items() if id(p) in weights}
        if skip is kinds is None:
            _warn_of_others(model, named, weights, head)
    chosen = {n: p for n, p in found.items() if p.requires_grad}
    if not chosen:
        left = "" if head is None else "; parameters=... takes the classifier, too"
        frozen = f"; {len(found)} are frozen: unfreeze some" if found else left
        of = f", modules={shown([k.__name__ for k in kinds])}" if kinds else ""
        raise FisherpruneError(
            f"prunable_parameters: {type(model).__name__} has no prunable parameters "
            f"among its {len(named)} (skip={skip!r}{of}){frozen}"
        )
    return chosen


def transposed_names(model: nn.Module, parameters: Parameters) -> frozenset[str]:
    """Return which parameters lie as [in, out, ...], other layers' as [out, in, ...].

    These are the weights of transposed convolutions and of Hugging Face's ``Conv1D``.

    Args:
        model: has the parameters.
        parameters: by name.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
        >>> transposed_names(net, dict(net.named_parameters()))
        frozenset({'1.weight'})
    """
    kinds = transposed_kinds()
    found = {
        id(module._parameters.get("weight"))
        for module in checked_model(model).modules()
        if isinstance(module, kinds)
    }
    return frozenset(name for name, p in parameters.items() if id(p) in found)


def classifier_name(model: nn.Module) -> str | None:
    """Return the name of the module that is taken for a model's classifier.

    ``prunable_parameters`` leaves its weights out unless ``skip`` is given; None where
    there is none.

    Example:
        >>> from torch import nn
        >>> classifier_name(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
        '2'
    """
    head = classifier_of(checked_model(model))
    return next((n for n, module in named_modules(model) if module is head), None)


def checked_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is a module.

    Raises:
        FisherpruneError: where it is not.
    """
    if not isinstance(model, nn.Module):
        raise FieldError("model", "a torch.nn.Module", type(model).__name__)
    settle(model)
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


def _warn_of_others(
    model: nn.Module, named: Parameters, chosen: set[int], head: nn.Module | None
) -> None:
    """Warn where most weights are not chosen: other kinds of modules own them."""
    known = chosen | {
        id(p)
        for module in model.modules()
        if module is head or is_embedding(module)
        for p in module.parameters()
    }
    others = {n: p for n, p in named.items() if id(p) not in known}
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


def owner(model: nn.Module, parameter: nn.Parameter) -> str:
    """Say whose parameter it is: ``Linear in MultiheadAttention``."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if any(p is parameter for p in module._parameters.values()):
            kind, around = type(module).__name__, modules[name.rpartition(".")[0]]
            return f"{kind} in {type(around).__name__}" if name else kind
    return type(model).__name__
