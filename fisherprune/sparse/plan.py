"""What compressing will change, found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fisherprune.masks.masks import Masks
from fisherprune.sparse.base import SparseLayer
from fisherprune.sparse.choose import Choice, Chosen
from fisherprune.sparse.fold import plan_folding
from fisherprune.sparse.layers import KINDS
from fisherprune.sparse.optimizers import Replacement
from fisherprune.sparse.replace import replaced

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""What a module that takes another one's place takes over; handles go on working."""


class Plan:
    """New modules for a model, and what becomes of its masks.

    Args:
        model: is left as it is until ``replace``; only with folding, weights that stay
            dense are masked now.
        choice: of its layers.
        fold: as of ``compress``.
    """

    def __init__(self, model: nn.Module, choice: Choice, fold: bool | None) -> None:
        self.model, self.choice = model, choice
        self.new: dict[nn.Module, nn.Module] = {}
        self.fold = not model.training if fold is None else fold
        if self.fold and self.choice.dense:
            Masks(self.choice.dense).apply_(model)  # of BatchNorm weights, too
        sparse = [chosen.module for chosen in self.choice.layers]
        self.folding = plan_folding(model, sparse, bool(fold)) if self.fold else None
        norms = self.folding.norms if self.folding else {}
        relus = self.folding.relus if self.folding else set()
        dense = {m: _fused(m, norms[m]) for m in norms}
        for chosen in self.choice.layers:
            layer = dense.pop(chosen.module, chosen.module)
            relu = chosen.module in relus
            self.new[chosen.module] = _sparse(layer, chosen, relu)
        self.new |= dense
        for old, new in self.new.items():
            _take_hooks(old, new)
        if self.folding:
            self.new |= {module: nn.Identity().eval() for module in self.folding.idle}

    def replacements(self) -> list[Replacement]:
        """Return the parameters that take the place of weights."""
        found = []
        for chosen in self.choice.layers:
            layer = cast(SparseLayer, self.new[chosen.module])
            names = chosen.name, f"{chosen.name.removesuffix('weight')}values"
            old = cast(nn.Parameter, chosen.module.weight)
            move = partial(_gathered, mask=chosen.mask)
            found.append(Replacement(old, layer.values, names, move))
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the state that the result will have."""
        if self.folding is not None:
            return self.result().state_dict()
        state, names = self.model.state_dict(), self._paths()
        for chosen in self.choice.layers:
            for name in names[chosen.module]:
                del state[f"{name}.weight"]
                state |= self.new[chosen.module].state_dict(prefix=f"{name}.")
        return state

    def relus(self) -> set[str]:
        """Return the names of the layers with a ReLU."""
        relus = self.folding.relus if self.folding else set()
        return {name for module in relus for name in self._paths()[module]}

    def _paths(self) -> dict[nn.Module, list[str]]:
        paths: dict[nn.Module, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(name)
        return paths

    def replace(self) -> None:
        """Put the new modules into the model."""
        replace_modules(self.model, self.new)

    def result(self) -> nn.Module:
        """Return the model, or the graph of what is left of its calls.

        It may be asked for before ``replace``, too.
        """
        if self.folding is None:
            return self.model
        names = dict(self.model.named_modules(remove_duplicate=False))
        root: dict[str, Any] = {}
        for node in self.folding.graph.nodes:
            if node.op == "call_module":
                module = names[node.target]
                root[node.target] = self.new.get(module, module)
            elif node.op == "get_attr":
                path, _, name = node.target.rpartition(".")
                root[node.target] = getattr(names[path], name)
        found = fx.GraphModule(root, self.folding.graph, type(self.model).__name__)
        for name, module in found.named_modules():
            module.training = names[name].training if name in names else False
        return replaced(found, layers=True)


def _sparse(layer: nn.Module, chosen: Chosen, relu: bool) -> SparseLayer:
    kind = KINDS[type(chosen.module)]
    return kind(cast(Any, layer), chosen.mask, relu=relu)


def _gathered(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor[mask.to(tensor.device)]


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return fuse_conv_bn_eval(cast(Any, layer), cast(Any, norm))


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in HOOKS:
        setattr(new, name, getattr(old, name))


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they are in a model."""
    for parent in _parents(model, new):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])


def _parents(
    model: nn.Module, new: Mapping[nn.Module, nn.Module]
) -> Iterator[nn.Module]:
    yield from [
        module
        for module in model.modules()
        if any(child in new for child in module._modules.values() if child is not None)
    ]
