"""How a tapped pass over the batches runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import check_unhooked, device_of
from fisherprune.persample.contributions import Contribution
from fisherprune.persample.tap import LayerTap
from fisherprune.statistics.apart import Seen, check_apart, run_last
from fisherprune.statistics.batches import checked_batches
from fisherprune.statistics.passes import Task


def tapped_passes(
    op: str,
    task: Task,
    head: Callable[[Tensor, Tensor], Tensor],
    report: Callable[[str, Contribution], None],
) -> Iterator[tuple[LayerTap, int, Tensor]]:
    """Run the forward pass of each batch; the caller runs the backward pass.

    Args:
        op: named in errors.
        task: its model is within ``evaluating``, its parameters are watched.
        head: ``(outputs, labels) -> Tensor``, from which the caller goes backward.
        report: as of ``LayerTap``.

    Yields:
        the tap, the number of samples, and what ``head`` returned.

    Raises:
        FisherpruneError: where there is no batch, samples mix, or a parameter is hooked
            or used outside of the supported layers.
    """
    model, parameters = task.model, task.parameters
    check_unhooked(parameters)
    empty, checked = True, False
    title = op if task.progress else ""
    device = device_of(parameters)
    for inputs, labels in checked_batches(task.batches, device, title):
        empty, n = False, len(inputs)
        check = not checked and n > 1
        # Before the batch, whose graph must not save what this forward pass changes.
        one = run_last(op, task, inputs, labels, head) if check else None
        tap = LayerTap(model, parameters, n, report, op, keep_last=check)
        with tap.forward():
            outputs = model(inputs)
            result = head(outputs, labels)
        if isinstance(one, FisherpruneError):
            raise one  # the whole batch runs
        if one is not None:
            check_apart(op, one, Seen(outputs, result, tap.last_inputs))
            tap.last_inputs, checked, one = [], True, None
        yield tap, n, result
    if empty:
        raise FisherpruneError(f"{op}: batches must hold samples, got none")
