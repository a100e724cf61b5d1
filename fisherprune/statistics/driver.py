"""How a tapped pass over the batches runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fisherprune.errors import FisherpruneError, FisherpruneWarning
from fisherprune.parameters import check_unhooked, device_of
from fisherprune.persample.contributions import Gradients
from fisherprune.persample.tap import LayerTap, UnknownGradientsError
from fisherprune.statistics.apart import Seen, check_apart, run_last
from fisherprune.statistics.batches import checked_batches, several
from fisherprune.statistics.passes import Task


def tapped_passes(
    op: str,
    task: Task,
    head: Callable[[Tensor, Tensor], Tensor],
    report: Callable[[str, Gradients], None] = lambda name, gradients: None,
    *,
    watch: bool = True,
) -> Iterator[tuple[LayerTap, int, Tensor]]:
    """Run the forward pass of each batch; the caller runs the backward pass.

    Args:
        op: named in errors.
        task: its model is within ``evaluating``, its parameters are watched.
        head: ``(outputs, labels) -> Tensor``, from which the caller goes backward.
        report: as of ``LayerTap``.
        watch: whether parameters are watched; else autograd has their gradients.

    Yields:
        the tap, the number of samples, and what ``head`` returned.

    Raises:
        FisherpruneError: where there is no batch, samples mix, or a parameter is hooked
            or used outside of the supported layers.
    """
    _warn_of_ranks(op)
    check_unhooked(task.parameters)
    device = device_of(task.parameters)
    if not watch:
        task = replace(task, parameters={})
    model, parameters = task.model, task.parameters
    empty, checked = True, False
    title = op if task.progress else ""
    for inputs, labels in checked_batches(task.batches, device, title):
        empty, n = False, len(inputs)
        check = not checked and n > 1
        # Before the batch, whose graph must not save what this forward pass changes.
        one = run_last(op, task, inputs, labels, head) if check else None
        tap = LayerTap(model, parameters, n, report, op, keep_last=check)
        if not watch:
            inputs, labels = several(inputs, labels)
        with tap.forward():
            outputs = model(inputs)
            result = head(outputs, labels)
            result = result if watch else result[:n]
        if isinstance(one, FisherpruneError):  # the whole batch runs
            raise UnknownGradientsError(op, tap.refused) if tap.refused else one
        if one is not None:
            whole = Seen(outputs, result, tap.last_inputs, tap.refused)
            check_apart(op, one, whole)
            tap.refused = one.refused | tap.refused
            tap.last_inputs, checked, one = [], True, None
        yield tap, n, result
    if empty:
        raise FisherpruneError(f"{op}: batches must hold samples, got none")


def _warn_of_ranks(op: str) -> None:
    """Warn where several processes of one job score: they do not add their data up."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if (ranks := distributed.get_world_size()) > 1:
        warnings.warn(
            f"{op}: each of the {ranks} ranks of torch.distributed scores its own "
            "batches, so their masks differ unless all ranks see the same data: score "
            "on one rank, and send its masks to the others by "
            "torch.distributed.broadcast",
            FisherpruneWarning,
            stacklevel=2,
        )
