"""Finds ReLU and residual behind batch normalization, and runs all three as one."""

from __future__ import annotations

import operator
import types
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fisherprune.errors import FisherpruneError, FisherpruneWarning, shown
from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.replace import replaced, restored

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
SUMS = (operator.add, torch.add, "add")
SUMS_IN_PLACE = (operator.iadd, "add_")
IN_PLACE = tuple(
    getattr(operator, name)
    for name in "iadd iand ifloordiv imod imul ior ipow isub itruediv ixor".split()
)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def fuse_relu(model: nn.Module) -> nn.Module:
    """Run batch normalization with the ReLU, and the residual, behind it as one op.

    ``torch.fx`` traces the model. Where BatchNorm -> ReLU or BatchNorm -> add -> ReLU
    is found, and nothing else reads what lies between, the model calls ``BatchNorm``
    with both. All modules stay where they are, but for those that ``replaced``
    exchanges: class, names, state_dict and optimizers of the model stay what they were.
    Modules with hooks are not fused; hooks of modules that are no leaves of the trace,
    such as ``nn.Sequential``, are not called any more. ``unfuse`` undoes it.

    A model that can't be traced, or whose graph is another in training than in
    evaluation, runs as before; a warning says why.

    Args:
        model: changed in place.

    Returns:
        The model.

    Raises:
        FisherpruneError: where ``model`` is not a module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> model = fuse_relu(model)
        >>> model(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 3])
    """
    if not isinstance(model, nn.Module):
        raise FisherpruneError(
            f"fuse_relu: model must be a torch.nn.Module, got {shown(model)}"
        )
    graph = _traced(model)
    if graph is None or not _fuse(graph, dict(model.named_modules())):
        return model
    replaced(model)
    traced = fx.GraphModule(model, graph)
    model.forward = types.MethodType(type(traced).forward, model)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse_relu``, in place: the model runs its own code, with its own modules.

    Args:
        model: what ``fuse_relu`` returned.

    Returns:
        The model.

    Raises:
        FisherpruneError: where ``model`` is not a module.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> type(unfuse(fuse_relu(model))[1]).__name__
        'BatchNorm2d'
    """
    restored(model)
    model.__dict__.pop("forward", None)
    return model


class _Tracer(fx.Tracer):
    """Looks into no module of this package that has kernels of its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("fisherprune.sparse.")
        return own or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.Graph | None:
    """Return the model's graph, the same in both modes, or warn."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        graphs = [_Tracer().trace(model.train(mode)) for mode in (True, False)]
    except Exception as error:  # whatever the model's code raises where it is traced
        _warn(f"torch.fx can't trace it: {type(error).__name__}: {error}")
        return None
    finally:  # modes, and what a forward pass sets on its modules
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
    if str(graphs[0]) != str(graphs[1]):
        _warn("it computes something else in training than in evaluation")
        return None
    return graphs[0]


def _warn(reason: str) -> None:
    warnings.warn(
        f"fuse_relu: the model runs as before: {reason}",
        FisherpruneWarning,
        stacklevel=5,
    )


def _fuse(graph: fx.Graph, modules: dict[str, nn.Module]) -> int:
    """Fuse what is found in the graph; return how often."""
    found = 0
    for relu in list(graph.nodes):
        if not _calls(relu, RELUS, nn.ReLU, modules):
            continue
        before = relu.all_input_nodes[0]
        norm, residual = before, None
        if _calls(before, SUMS + SUMS_IN_PLACE, None, modules):
            norm, residual = _summands(before, modules)
        if norm is None or not _is_norm(norm, modules):
            continue
        if _changes_between(norm, relu, before, modules):
            continue
        with graph.inserting_before(relu):
            args = (norm.args[0], *(() if residual is None else (residual,)))
            fused = graph.call_module(norm.target, args, {"relu": True})
        relu.replace_all_uses_with(fused)
        for node in (relu, before) if residual is None else (relu, before, norm):
            graph.erase_node(node)
        found += 1
    return found


def _calls(
    node: fx.Node,
    functions: tuple[Any, ...],
    kind: type[nn.Module] | None,
    modules: dict[str, nn.Module],
) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is kind and not _has_hooks(module)
    return node.op in ("call_function", "call_method") and node.target in functions


def _summands(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the normalization and the other operand of a sum that one node reads."""
    if len(node.users) != 1 or len(node.args) != 2 or node.kwargs:
        return None, None
    pairs = [node.args, node.args[::-1]]
    if node.target in SUMS_IN_PLACE:  # what is overwritten must be the norm's own
        pairs = pairs[:1]
    for norm, other in pairs:
        if not isinstance(norm, fx.Node) or not isinstance(other, fx.Node):
            continue
        if norm is not other and _is_norm(norm, modules):
            return norm, other
    return None, None


def _changes_between(
    first: fx.Node, last: fx.Node, known: fx.Node, modules: dict[str, nn.Module]
) -> bool:
    """Return whether something is changed in place while the fused op waits."""
    node = first.next
    while node is not last:
        if node.op == "call_module":
            changes = getattr(modules[str(node.target)], "inplace", False)
        else:
            name = getattr(node.target, "__name__", str(node.target))
            written = name.endswith("_") and not name.endswith("__")
            in_place = node.target in IN_PLACE or name == "setitem"
            changes = (
                written or in_place or "inplace" in node.kwargs or "out" in node.kwargs
            )
        if changes and node is not known:
            return True
        node = node.next
    return False


def _is_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether it is a normalization that one node reads, without a ReLU."""
    if node.op != "call_module" or len(node.users) != 1:
        return False
    module = modules[str(node.target)]
    plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    own = type(module) is BatchNorm and not module.relu
    called = len(node.args) == 1 and not node.kwargs
    return (plain or own) and called and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)
