"""The check before any pass: in which way each parameter's gradients will be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import (
    Parameters,
    checked_model,
    checked_parameters,
    plain_parameters,
)
from fisherprune.persample.functions import Function
from fisherprune.shards import check_whole
from fisherprune.statistics.accumulators import Forgetful
from fisherprune.statistics.batches import check_batch, reason
from fisherprune.statistics.conditions import settings_of
from fisherprune.statistics.coverage import Coverage
from fisherprune.statistics.driver import LoneSample, tapped_passes
from fisherprune.statistics.forward import of_losses
from fisherprune.statistics.losses import Losses, LossFn
from fisherprune.statistics.passes import Task, checked_task
from fisherprune.statistics.protect import evaluating
from fisherprune.statistics.structure import count_samples, some_samples
from fisherprune.statistics.sums import PerSampleSums

CHECK_BEFORE = "check the model before it is split, or a copy"

SAMPLES = 3
"""With which a model is tried: enough to tell them from a lone one."""


def check(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    losses: Losses | None = None,
    parameters: Parameters | None = None,
) -> Coverage:
    """Say of each parameter how its per-sample gradients will be found, or why not.

    Runs the first three samples of the batch forward and backward, one of them alone
    too, as a statistics pass begins; nothing is summed up, so beside activations and
    the gradients of one parameter at a time no memory is taken. What stops the pass as
    a whole (samples that mix, activation checkpointing) is the reason of all parameters
    that it stops.

    Args:
        model: any module; left as found.
        batch: one batch as ``gradient_moments`` takes it: ``(inputs, labels)``, samples
            first, or with ``losses`` of any structure.
        loss_fn: as in ``gradient_moments``.
        losses: as in ``gradient_moments``.
        parameters: by name; all of the model by default.

    Returns:
        The ways by parameter; printed, a table.

    Raises:
        FisherpruneError: where an argument can't be used, whatever the model does with
            it: a batch without samples, a loss that is no function.

    Example:
        >>> import torch, fisherprune
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 5), torch.randint(3, (16,))
        >>> found = fisherprune.check(net.eval(), batch)
        >>> found.ways["0.weight"], found.covers["rules"]
        (('linear',), 1.0)
    """
    if parameters is None:
        parameters = plain_parameters(checked_model(model))
    if not parameters or not isinstance(parameters, Mapping):
        checked_parameters(model, parameters)  # raises
    unusable = {n: why for n, p in parameters.items() if (why := _why_unusable(p))}
    usable = {n: p for n, p in parameters.items() if n not in unusable}
    check_whole("check: parameters", CHECK_BEFORE, parameters)
    check_batch(0, batch, labelled=losses is None)
    few = some_samples(batch, slice(SAMPLES))
    ways: dict[str, tuple[str, ...]] = {}
    seen = _Seen()
    if usable:
        task = checked_task(model, [few], usable, loss_fn, losses=losses)
        with seen:
            ways, reasons = _tried(task)
        unusable |= reasons
    return Coverage(
        {name: ways.get(name, ()) for name in parameters},
        {name: unusable[name] for name in parameters if name in unusable},
        {name: p.numel() for name, p in parameters.items()},
        tuple(settings_of(model, parameters, seen.functions, count_samples(few))),
        count_samples(few),
    )


def _why_unusable(parameter: nn.Parameter) -> str | None:
    if not parameter.is_floating_point():
        kind = str(parameter.dtype).removeprefix("torch.")
        return f"it is of {kind}: gradients are of real floating-point numbers"
    if parameter._backward_hooks:
        return "a gradient hook (register_hook) changes it: remove it for scoring"
    return None


def _tried(task: Task) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the ways of parameters, and why some are slow or none."""
    sums = _Trial(task, group_size=1)
    try:
        with evaluating(task.model, task.parameters.values()):
            for each in tapped_passes("check", task, of_losses(task), sums):
                each.backward(each.result.sum())
                if isinstance(each, LoneSample):
                    break  # before the warning: the table says it
    except Warning:
        raise
    except Exception as error:
        ours = isinstance(error, FisherpruneError)
        why = f"{error}".removeprefix("check: ") if ours else reason(error)
        return {}, dict.fromkeys(task.parameters, why)
    unused = {n: UNUSED for n, ways in sums.paths.items() if not ways}
    return sums.paths, unused | sums.reasons


UNUSED = "no loss of these samples depends on it: its gradients are zero"


class _Trial(PerSampleSums):
    """Finds ways, and sums nothing up."""

    accumulators = Forgetful


class _Seen(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Function] = set()

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function."""
        self.functions.add(func)
        return func(*args, **(kwargs or {}))
