"""Exchanges PyTorch's modules for those with kernels for sparse execution, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fisherprune.errors import FisherpruneError, shown
from fisherprune.sparse.convolve import Conv2d
from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.pool import MaxPool2d

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.BatchNorm3d: BatchNorm,
    nn.MaxPool2d: MaxPool2d,
}
"""What ``replaced`` replaces, and by what; what derives from the former stays."""
LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Conv2d}
"""The same of layers that stay dense among sparse ones."""


def replaced(model: nn.Module, *, layers: bool = False) -> nn.Module:
    """Put ours in the place of a model's BatchNorm1d, 2d, 3d and MaxPool2d, in place.

    Parameters and buffers stay the same objects under the same names: neither
    optimizers nor files notice. Hooks and all else that a module holds move along.
    ``restored`` undoes it.

    Args:
        model: changed in place, unless it is such a module itself.
        layers: whether Conv2d are replaced, too, as ``compress`` does with those that
            stay dense; they become sparse no more.

    Returns:
        The model, or what has its place.

    Raises:
        FisherpruneError: where ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> type(replaced(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))[0]).__name__
        'BatchNorm'
    """
    kinds = OURS | LAYERS if layers else OURS
    return _exchanged("replaced", model, lambda module: _ours(module, kinds))


def restored(model: nn.Module) -> nn.Module:
    """Put the modules back whose places ``replaced`` gave away, in place.

    Args:
        model: changed in place, unless it is such a module itself.

    Returns:
        The model, or what has its place.

    Raises:
        FisherpruneError: where ``model`` is not a module, or a module has a ReLU of its
            own, which those of ``torch.nn`` can't have.

    Example:
        >>> from torch import nn
        >>> restored(replaced(nn.MaxPool2d(2)))
        MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    """
    return _exchanged("restored", model, _theirs)


def _ours(
    module: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]
) -> nn.Module:
    kind = kinds.get(type(module))
    if kind is None:
        return module
    new = _with_state_of(module, kind)
    new.kind = type(module)
    return new


def _theirs(module: nn.Module) -> nn.Module:
    kind = getattr(module, "kind", None)
    if kind is None or (OURS | LAYERS).get(kind) is not type(module):
        return module
    if getattr(module, "relu", False):
        raise FisherpruneError(
            f"restored: a {kind.__name__} has no ReLU, got {shown(module)}"
        )
    new = _with_state_of(module, kind)
    for name in ("kind", "relu"):
        new.__dict__.pop(name, None)
    return new


def _with_state_of(module: nn.Module, kind: type[nn.Module]) -> Any:
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    return new


def _exchanged(
    function: str, model: nn.Module, new_of: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Exchange modules by a rule; one that is in several places stays one."""
    if not isinstance(model, nn.Module):
        raise FisherpruneError(
            f"{function}: model must be a torch.nn.Module, got {shown(model)}"
        )
    new = {id(m): new_of(m) for m in model.modules()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and new[id(child)] is not child:
                setattr(parent, name, new[id(child)])
    return new[id(model)]
