"""The parameters that a gradient is taken of, beside those that are scored."""

from __future__ import annotations

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.modules import layer_kinds, weights_of
from fisherprune.parameters import Parameters, plain_parameters
from fisherprune.statistics.passes import Task


def flow_parameters(task: Task) -> Parameters:
    """Return the scored parameters, then the others of the gradient flow.

    Which these are says ``Settings.flow``.

    Raises:
        FisherpruneError: where the weights of layers are asked for and one of them is
            computed from other parameters.
    """
    others = {} if task.settings.flow == "scored" else other_trained(task)
    if task.settings.flow == "weights":
        weights = _layer_weights(task)
        others = {name: p for name, p in others.items() if id(p) in weights}
    return task.parameters | others


def _layer_weights(task: Task) -> set[int]:
    try:
        return weights_of(task.model, layer_kinds(), head=None, skip=())
    except FisherpruneError:
        wanted = "trainable or scored where a weight is computed from other parameters"
        raise FieldError("flow", wanted, "'weights'") from None


def other_trained(task: Task) -> Parameters:
    """Return the trainable parameters that are not scored, by names for errors."""
    scored = {id(p) for p in task.parameters.values()}
    return {
        f"{name} (not scored)": p
        for name, p in plain_parameters(task.model).items()
        if p.requires_grad and p.is_floating_point() and id(p) not in scored
    }
