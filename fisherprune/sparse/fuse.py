"""Finds ReLU and residual behind batch normalization, and runs all three as one."""

from __future__ import annotations

import types
import warnings

from torch import fx, nn

from fisherprune.errors import FisherpruneError, FisherpruneWarning, shown
from fisherprune.sparse.calls import (
    Tracer,
    changes_between,
    has_hooks,
    is_relu,
    summands,
)
from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.replace import replaced, restored


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


def _traced(model: nn.Module) -> fx.Graph | None:
    """Return the model's graph, the same in both modes, or warn."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        graphs = [Tracer().trace(model.train(mode)) for mode in (True, False)]
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
        if not is_relu(relu, modules):
            continue
        before = relu.all_input_nodes[0]
        pair = None
        if len(before.users) == 1:
            pair = summands(before, lambda node: _is_norm(node, modules))
        norm, residual = pair or (before, None)
        if not _is_norm(norm, modules):
            continue
        if changes_between(norm, relu, before, modules):
            continue
        with graph.inserting_before(relu):
            args = (norm.args[0], *(() if residual is None else (residual,)))
            fused = graph.call_module(str(norm.target), args, {"relu": True})
        relu.replace_all_uses_with(fused)
        for node in (relu, before) if residual is None else (relu, before, norm):
            graph.erase_node(node)
        found += 1
    return found


def _is_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether it is a normalization that one node reads, without a ReLU."""
    if node.op != "call_module" or len(node.users) != 1:
        return False
    module = modules[str(node.target)]
    plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    own = type(module) is BatchNorm and not module.relu
    called = len(node.args) == 1 and not node.kwargs
    return (plain or own) and called and not has_hooks(module)
