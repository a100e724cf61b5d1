"""How a tapped pass over the batches runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.parameters import (
    Parameters,
    check_unhooked,
    device_of,
)
from fisherprune.persample.contributions import Contribution
from fisherprune.persample.tap import LayerTap
from fisherprune.statistics.apart import Seen, check_apart, run_last
from fisherprune.statistics.batches import Batches, checked_batches


def tapped_passes(
    op: str,
    model: nn.Module,
    batches: Batches,
    parameters: Parameters,
    head: Callable[[Tensor, Tensor], Tensor],
    report: Callable[[str, Contribution], None],
) -> Iterator[tuple[LayerTap, int, Tensor]]:
    """Run the forward pass of each batch; what goes backward is the caller's.

    Args:
        op: named in errors.
        model: within ``evaluating``.
        batches: iterable of ``(inputs, labels)``.
        parameters: the watched parameters by name.
        head: ``(outputs, labels) -> Tensor``, what the caller goes backward from.
        report: as of ``LayerTap``.

    Yields:
        the tap, the number of samples, and what ``head`` returned.

    Raises:
        FisherpruneError: where there is no batch, samples mix, or a parameter is hooked
            or used outside of the supported layers.
    """
    check_unhooked(parameters)
    empty, checked = True, False
    for inputs, labels in checked_batches(batches, device_of(parameters)):
        empty, n = False, len(inputs)
        check = not checked and n > 1
        # First: what its forward pass changes, the batch's graph may not have saved.
        one = run_last(op, model, inputs, labels, parameters, head) if check else None
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
