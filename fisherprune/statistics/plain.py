"""How a pass over the batches runs where autograd sums gradients up by itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fisherprune.errors import FisherpruneError
from fisherprune.persample.rowwise_tap import RowwiseTap
from fisherprune.statistics.apart import check_apart, check_beside, run_alone
from fisherprune.statistics.batches import Batch, running
from fisherprune.statistics.driver import batches_of
from fisherprune.statistics.forward import Forward, Ran
from fisherprune.statistics.passes import Task
from fisherprune.statistics.protect import forgetting, versions_of
from fisherprune.statistics.rowwise import constants_of, may_be_rowwise, run_rowwise
from fisherprune.statistics.verdicts import Verdicts


def plain_passes(op: str, task: Task, forward: Forward) -> Iterator[tuple[int, Tensor]]:
    """Run the forward pass of each batch for plain autograd.

    Yields:
        the number of samples, and the result.

    Raises:
        FisherpruneError: as in ``tapped_passes``; that samples mix is seen in the
            outputs and losses alone.
    """
    forward, checked, verdicts = forgetting(task.model, forward), False, Verdicts()
    for batch in batches_of(op, task):
        if checked or batch.size == 1:
            with running(op, batch):
                ran = forward(task.model, batch if batch.size > 1 else batch.alone(0))
        else:
            known = _run_rowwise(op, task, forward, batch)
            ran, checked = known or _run_compared(op, task, forward, batch), True
        verdicts.expect(ran.conditions)
        yield batch.size, ran.result[: batch.size]
    verdicts.settle()


def _run_rowwise(op: str, task: Task, forward: Forward, batch: Batch) -> Ran | None:
    """Run a batch; None where it is not known that its samples do not mix."""
    constants = constants_of(task, batch) if may_be_rowwise(task) else None
    if constants is None:
        return None
    tap = RowwiseTap(
        *({}, batch.tensors, batch.size, lambda name, gradients: None, op),
        constants=constants,
    )
    return run_rowwise(op, task, forward, batch, tap, tap)


def _run_compared(op: str, task: Task, forward: Forward, batch: Batch) -> Ran:
    """Run a batch, and a sample of it alone.

    Raises:
        FisherpruneError: where samples mix.
    """
    alone, few = run_alone(op, task, {}, batch, forward), batch.last(3)
    with running(op, batch):
        ran = forward(task.model, batch)
    if isinstance(alone, FisherpruneError):
        raise alone
    check_apart(op, alone, ran)
    before = versions_of(task.model)
    check_beside(op, task, forward, few)
    if versions_of(task.model) == before:
        return ran
    with running(op, batch):  # its graph saved what that changed
        return forward(task.model, batch)
