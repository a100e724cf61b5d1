"""Traces models by torch.fx, and says what calls do: ReLU, sums, changes in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
SUMS = (operator.add, torch.add, "add")
SUMS_IN_PLACE = (operator.iadd, "add_")
NAMES = (
    "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor"
)
IN_PLACE = {name: getattr(operator, name) for name in NAMES.split()}
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _Proxy(fx.Proxy):
    """Notes ``a += b`` as what it is: other names of the tensor see the sum.

    ``torch.fx`` notes ``a = a + b``.
    """


def _noted(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in IN_PLACE.items():
    setattr(_Proxy, f"__{_name}__", _noted(_function))


class Tracer(fx.Tracer):
    """Traces what is changed in place.

    It looks into no module of this package that has kernels of its own.
    """

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a value."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one call."""
        own = type(m).__module__.startswith("fisherprune.sparse.")
        return own or super().is_leaf_module(m, module_qualified_name)


def has_hooks(module: nn.Module) -> bool:
    """Return whether something else runs when the module does."""
    return any(getattr(module, name, None) for name in HOOKS)


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a node is a ReLU, of whatever form, without hooks."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and not has_hooks(module)
    return node.op in ("call_function", "call_method") and node.target in RELUS


def summands(
    node: fx.Node, is_ours: Callable[[fx.Node], bool]
) -> tuple[fx.Node, fx.Node] | None:
    """Return ours of the two nodes that a node adds up, and the other; else None.

    A sum that is written into a summand counts if that is ours.
    """
    known = SUMS + SUMS_IN_PLACE
    if node.op not in ("call_function", "call_method") or node.target not in known:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    pairs = [node.args, node.args[::-1]]
    for ours, other in pairs[:1] if node.target in SUMS_IN_PLACE else pairs:
        if not isinstance(ours, fx.Node) or not isinstance(other, fx.Node):
            continue
        if ours is not other and is_ours(ours):
            return ours, other
    return None


def changes_between(
    first: fx.Node, last: fx.Node, known: fx.Node, modules: Mapping[str, nn.Module]
) -> bool:
    """Return whether something is changed in place after one node and before another.

    Args:
        first: not looked at.
        last: not looked at.
        known: a node between that does not count.
        modules: of the graph, by name.
    """
    node = first.next
    while node is not last:
        if node.op == "call_module":
            changes = getattr(modules[str(node.target)], "inplace", False)
        else:
            name = getattr(node.target, "__name__", str(node.target))
            written = name.endswith("_") and not name.endswith("__")
            in_place = node.target in IN_PLACE.values() or name == "setitem"
            changes = (
                written or in_place or "inplace" in node.kwargs or "out" in node.kwargs
            )
        if changes and node is not known:
            return True
        node = node.next
    return False
