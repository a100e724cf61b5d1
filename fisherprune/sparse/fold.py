"""What can be folded into the layer before it, by a traced graph.

That are BatchNorm, the addition of a residual, and ReLU.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import fx, nn

from fisherprune.errors import FisherpruneWarning
from fisherprune.sparse.base import SparseLayer
from fisherprune.sparse.calls import (
    Tracer,
    changes_between,
    has_hooks,
    is_relu,
    summands,
)

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
"""Which normalization follows which layer.

That of a Linear normalizes another dimension where there are positions; a graph does
not say whether there are.
"""


@dataclass
class Folding:
    """A graph of a model without what was folded, and what that is.

    Attributes:
        graph: the calls that are left.
        norms: BatchNorm modules by the convolution that they are folded into.
        relus: layers whose output goes into a ReLU alone.
        sums: how many calls of layers have a residual, and maybe a ReLU behind it, as
            further arguments.
        idle: modules of which every call was folded.
    """

    graph: fx.Graph
    norms: dict[nn.Module, nn.Module] = field(default_factory=dict)
    relus: set[nn.Module] = field(default_factory=set)
    sums: int = 0
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
            graph = Tracer().trace(model)
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
    return folding if folding.norms or folding.relus or folding.sums else None


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
            self._fold_sum(node)
        for node in list(graph.nodes):
            self._fold_relu(node)
        graph.lint()
        return self._folding

    def _before(self, node: fx.Node) -> nn.Module | None:
        """Return the layer whose output goes here alone, if it runs once."""
        source = node.args[0] if node.args else None
        return self._layer(source) if isinstance(source, fx.Node) else None

    def _layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer whose call it is, if it runs once and one node reads it."""
        layer = self._module(node)
        if layer is None or self._calls[layer] > 1 or has_hooks(layer):
            return None
        return layer if len(node.users) == 1 else None

    def _fold_norm(self, node: fx.Node) -> None:
        norm, layer = self._module(node), self._before(node)
        if norm is None or layer is None or has_hooks(norm):
            return
        pair = type(norm) is PAIRS.get(type(layer))
        if pair and self._calls[norm] == 1 and _is_settled(layer, norm):
            self._folding.norms[layer] = norm
            self._take_out(node, norm)

    def _fold_sum(self, node: fx.Node) -> None:
        pair = summands(node, self._is_convolution)
        if pair is None:
            return
        call, residual = pair  # the call waits for the residual
        plain = len(call.args) == 1 and not call.kwargs
        if not plain or changes_between(call, node, node, self._modules):
            return
        graph = self._folding.graph
        with graph.inserting_before(node):
            args = (call.args[0], residual)
            node.replace_all_uses_with(graph.call_module(str(call.target), args))
        graph.erase_node(node)
        graph.erase_node(call)
        self._folding.sums += 1

    def _is_convolution(self, node: fx.Node) -> bool:
        """Return whether it is a sparse layer that takes a residual."""
        layer = self._layer(node)
        return layer in self._sparse and type(layer) is nn.Conv2d

    def _fold_relu(self, node: fx.Node) -> None:
        layer = self._before(node)
        if layer not in self._sparse or not is_relu(node, self._modules):
            return
        assert layer is not None
        call, module = node.args[0], self._module(node)
        assert isinstance(call, fx.Node)
        if len(call.args) > 1:  # behind the sum, which the layer alone has not
            call.args, module = (*call.args, True), None  # the model calls it still
        else:
            self._folding.relus.add(layer)
        self._take_out(node, module)

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


def unfold_sums(model: nn.Module) -> None:
    """Let a graph add residuals itself, in place, as dense layers need it."""
    if not isinstance(model, fx.GraphModule):
        return
    graph, modules = model.graph, dict(model.named_modules(remove_duplicate=False))
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) < 2:
            continue
        if isinstance(modules[str(node.target)], SparseLayer):
            _unfold_sum(graph, node)
    model.recompile()


def _unfold_sum(graph: fx.Graph, node: fx.Node) -> None:
    x, residual, *relu = node.args
    with graph.inserting_before(node):
        end = graph.call_module(str(node.target), (x,))
        end = graph.call_function(operator.add, (end, residual))
        end = graph.call_function(F.relu, (end,)) if relu else end
    node.replace_all_uses_with(end)
    graph.erase_node(node)
