"""What BatchNorm and ReLU after a layer can be folded into it, by a traced graph."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from fisherprune.errors import FisherpruneWarning

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
"""Which normalization follows which layer.

That of a Linear normalizes another dimension where there are positions; a graph does
not say whether there are.
"""
FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
METHODS = ("relu", "relu_")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@dataclass
class Folding:
    """A graph of a model without what was folded, and what that is.

    Attributes:
        graph: the calls that are left.
        norms: BatchNorm modules by the convolution that they are folded into.
        relus: layers whose output goes into a ReLU alone.
        idle: modules of which every call was folded.
    """

    graph: fx.Graph
    norms: dict[nn.Module, nn.Module] = field(default_factory=dict)
    relus: set[nn.Module] = field(default_factory=set)
    idle: set[nn.Module] = field(default_factory=set)


def plan_folding(
    model: nn.Module, sparse: Collection[nn.Module], warn: bool
) -> Folding | None:
    """Return what can be folded; None where nothing can, or the model is untraceable.

    Args:
        model: in evaluation mode; is left as it is.
        sparse: layers that become sparse, which can have a ReLU.
        warn: say where it can't be traced, also if it has no BatchNorm.
    """
    try:
        with _unchanged(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:  # forward passes raise anything when they meet a proxy
        if warn or any(type(m) in PAIRS.values() for m in model.modules()):
            reason = (f"{error}".splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"compress: torch.fx can't trace the model ({reason}), so BatchNorm "
                "and ReLU are not folded into the layers before them",
                FisherpruneWarning,
                stacklevel=4,
            )
        return None
    folding = _Finder(model, graph, sparse).found()
    return folding if folding.norms or folding.relus else None


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a traced forward pass sets on the modules."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


class _Finder:
    """Finds what can be folded in a graph, and takes it out."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, sparse: Collection[nn.Module]
    ) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._sparse = set(sparse)
        self._folding = Folding(graph)
        called = (self._module(node) for node in graph.nodes)
        self._calls = Counter(module for module in called if module is not None)

    def _module(self, node: object) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self._modules[str(node.target)]
        return None

    def found(self) -> Folding:
        """Fold all that can be."""
        graph = self._folding.graph
        for node in list(graph.nodes):
            self._fold_norm(node)
        for node in list(graph.nodes):
            self._fold_relu(node)
        graph.lint()
        return self._folding

    def _before(self, node: fx.Node) -> nn.Module | None:
        """Return the layer whose output goes here alone, if it runs once."""
        source = node.args[0] if node.args else None
        layer = self._module(source)
        if layer is None or self._calls[layer] > 1 or _has_hooks(layer):
            return None
        assert isinstance(source, fx.Node)
        return layer if list(source.users) == [node] else None

    def _fold_norm(self, node: fx.Node) -> None:
        norm, layer = self._module(node), self._before(node)
        if norm is None or layer is None or _has_hooks(norm):
            return
        pair = type(norm) is PAIRS.get(type(layer))
        if pair and self._calls[norm] == 1 and _is_settled(layer, norm):
            self._folding.norms[layer] = norm
            self._take_out(node, norm)

    def _fold_relu(self, node: fx.Node) -> None:
        module, layer = self._module(node), self._before(node)
        if layer not in self._sparse or not self._is_relu(node, module):
            return
        assert layer is not None
        self._folding.relus.add(layer)
        self._take_out(node, module)

    def _is_relu(self, node: fx.Node, module: nn.Module | None) -> bool:
        if module is not None:
            return type(module) is nn.ReLU and not _has_hooks(module)
        known = FUNCTIONS if node.op == "call_function" else METHODS
        return node.op in ("call_function", "call_method") and node.target in known

    def _take_out(self, node: fx.Node, module: nn.Module | None) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        self._folding.graph.erase_node(node)
        if module is not None:
            self._calls[module] -= 1
            if not self._calls[module]:
                self._folding.idle.add(module)


def _is_settled(layer: nn.Module, norm: nn.Module) -> bool:
    """Return whether a normalization is a fixed affine map of the layer's channels."""
    fixed = getattr(norm, "running_mean", None) is not None
    same = getattr(norm, "num_features", 0) == getattr(layer, "out_channels", None)
    return fixed and same and not (norm.training or layer.training)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)
