"""A model under watch: its calls, and which of them and of their losses are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import check_unhooked
from fisherprune.persample.observing import ObservingTap
from fisherprune.statistics.passes import Task
from fisherprune.statistics.sample_calls import not_seen

Run = Callable[..., Any]


class Watched:
    """A model's ``forward``, whose calls are handed to a function.

    Args:
        model: whose method it is; copies that are made of it have it, too.
        call: of ``forward`` and its arguments.
    """

    def __init__(self, model: nn.Module, call: Run) -> None:
        self.model, self.forward, self.call = model, model.forward, call
        self.running = False

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        if module is not self.model:
            return type(module).forward(module, *args, **kwargs)
        if self.running or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        self.running = True
        try:
            return self.call(self.forward, args, kwargs)
        finally:
            self.running = False


def put_back(own: dict[str, Any], forward: Run | None) -> None:
    """Give a model the ``forward`` again that was among its own attributes."""
    own.pop("forward", None)
    if forward is not None:
        own["forward"] = forward


def check_watchable(op: str, task: Task, model: nn.Module) -> None:
    """Refuse what can't be watched.

    Raises:
        FisherpruneError: where the model is watched already or runs on several devices,
            or a parameter is frozen, sharded or hooked.
    """
    if isinstance(getattr(vars(model).get("forward"), "__func__", None), Watched):
        raise FisherpruneError(f"{op}: the model must be watched by one context only")
    several = (m for m in task.model.modules() if isinstance(m, DataParallel))
    if any(len(each.device_ids) > 1 for each in several):
        raise FisherpruneError(
            f"{op}: the model must run on one device, got DataParallel: use "
            "DistributedDataParallel"
        )
    for name, parameter in task.parameters.items():
        if not parameter.requires_grad:
            raise FisherpruneError(
                f"{op}: parameters must require gradients, got {name!r}, which is "
                "frozen: leave it out, or use gradient_moments"
            )
        if hasattr(parameter, "full_tensor"):
            raise FisherpruneError(
                f"{op}: parameters must be whole, got {name!r}, which is sharded: "
                "leave it out"
            )
    check_unhooked(task.parameters)


def checked_tap(
    op: str, taps: list[ObservingTap], loss: Tensor, options: dict[str, Any]
) -> ObservingTap:
    """Return the tap of a loss whose backward pass may run.

    Args:
        op: named in errors.
        taps: of the calls of the model that lead to the loss.
        loss: of the pass.
        options: of ``loss.backward``.

    Raises:
        FisherpruneError: where it may not.
    """
    if len(taps) > 1:
        raise FisherpruneError(
            f"{op}: a backward pass must lead through one call of the model, got "
            f"{len(taps)}: run one for each call, or, where a sample is in several, "
            "watch a module that makes them all in one call"
        )
    if taps[0].spent:
        raise FisherpruneError(
            f"{op}: a second backward pass leads through the same call of the model, "
            "whose squares it would need: add the losses up and run one"
        )
    for name in ("create_graph", "inputs"):
        value = options.get(name)
        if value is not None and value is not False:
            raise FisherpruneError(
                f"{op}: backward must be called without {name} inside of the context"
            )
    taps[0].prepare(loss)
    check_seen(op, taps[0])
    return taps[0]


def check_seen(op: str, tap: ObservingTap) -> None:
    """Refuse a call of the model whose gradients of single samples are not seen."""
    for name, why in tap.refused.items():
        raise not_seen(op, name, why)
