"""The check that samples of a batch don't mix: one is run alone, too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisherprune.errors import FisherpruneError
from fisherprune.persample.alone import Recorder, Records, read_at_once
from fisherprune.persample.calls import Key
from fisherprune.persample.rows import LargeReachCheck, ReachCheck, RowCheck
from fisherprune.persample.tap import LayerTap, OwnGradientsError
from fisherprune.statistics.batches import Batch, backward, reason, running
from fisherprune.statistics.forward import Forward, Ran
from fisherprune.statistics.passes import Task

SMALL = 3
"""Times that a few samples are in a batch from which on they run by themselves."""
SAME, NEARLY = 3e-7, 1e-5
"""By which results of the same shapes may differ, of a sample beside others: where its
gradients reach others, and where nothing is known of them."""


@dataclass(frozen=True)
class Alone:
    """What came of a sample alone."""

    ran: Ran
    records: Records


def run_alone(
    op: str,
    task: Task,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    forward: Forward,
    sample: int = -1,
    made: Collection[Key] = (),
    compares_late: bool = True,
) -> Alone | FisherpruneError:
    """Run a sample alone; return why where that fails.

    The last one first, because what a sequence, a queue or a limited capacity makes of
    a sample depends on the samples before it. For ``made`` see ``Recorder``, for
    ``compares_late`` see ``Records``.
    """
    one, records = batch.one(sample), Records(sample, compares_late)
    recorder = Recorder(parameters, one.tensors, records, made)
    try:
        with recorder:
            ran = forward(task.model, one)
    except Exception as error:
        which = "the last" if sample else "one"
        failure = FisherpruneError(
            f"{op}: the model must run with one sample, by which is seen whether "
            f"samples mix; alone, {which} of the first batch fails: "
            f"{reason(error)}"
        )
        failure.__cause__ = error
        return failure
    return Alone(ran.detached(), records)


class Compared(NamedTuple):
    """What values of a sample alone and of its batch say.

    Attributes:
        reads_same: whether calls read the same, where that was left open.
        has_alike: whether all samples may be the same in a tensor other than the
            model's outputs, behind which losses are computed sample by sample.
    """

    reads_same: bool
    has_alike: bool


def check_apart(op: str, alone: Alone, together: Ran) -> Compared:
    """Refuse where a sample's results differ, alone and in its batch.

    A small loss has the rounding errors of the outputs from which it was computed.

    Raises:
        FisherpruneError: where results differ, or a condition on the batch's does not
            hold.
    """
    outputs, one, i = together.outputs, alone.ran, alone.records.sample
    tolerance = tolerance_of(together.result if outputs is None else outputs)
    differ, size = {}, None
    if one.outputs is not None and outputs is not None:
        size = outputs[i].detach().float().norm()
        differ["the model's output for"] = _differs(
            one.outputs[0], outputs[i], tolerance
        )
    own, other = one.result[0].detach(), together.result[i].detach()
    is_one_finite = own.isfinite().all() != other.isfinite().all()
    differ["the loss of"] = _differs(own, other, tolerance, size) | is_one_finite
    broken = [~condition.holds for condition in together.conditions]
    unsure, alike = alone.records.late_verdicts(outputs)
    flags = [*broken, *differ.values(), *unsure, *alike]
    verdicts = read_at_once([flag.view(()) for flag in flags])
    for condition, is_broken in zip(together.conditions, verdicts, strict=False):
        if is_broken:
            raise condition.error()
    verdicts = verdicts[len(broken) :]
    for what, differs in zip(differ, verdicts, strict=False):
        if differs:
            raise FisherpruneError(
                f"{op}: samples mix: {what} a sample alone is another than in a batch "
                "(or it is random in eval mode, or samples change places on the way, "
                "or the model keeps a state from one call to the next)"
            )
    alike_from = len(verdicts) - len(alike)
    is_unsure, has_alike = any(verdicts[:alike_from]), any(verdicts[alike_from:])
    return Compared(alone.records.read_same(is_unsure), has_alike)


def check_untapped(op: str, task: Task, batch: Batch, forward: Forward) -> bool:
    """Refuse where samples mix, by a run of a batch's copy with no tap.

    Returns:
        whether that can be seen, not of a lone sample.

    Raises:
        FisherpruneError: as ``check_apart``, or where the model fails.
    """
    if batch.size == 1:
        return False
    alone, whole = run_alone(op, task, {}, batch, forward), batch.last(batch.size)
    with running(op, whole):
        ran = forward(task.model, whole)
    if isinstance(alone, FisherpruneError):  # the whole batch runs
        raise alone
    check_apart(op, alone, ran)
    check_beside(op, task, forward, batch.last(3))
    return True


def check_reach(
    op: str, task: Task, forward: Forward, few: Batch, tap: LayerTap, result: Tensor
) -> dict[str, str]:
    """See whether gradients of the losses of samples reach rows of others.

    Those are zeros where samples do not mix. Values may be nearly the same, alone and
    in a batch, though they do: of losses with a small part of the whole batch's.

    Args:
        op: named in errors.
        task: with the model.
        forward: the pass.
        few: of at most three samples, as no run has changed them. Two of them run
            where that is a small part of the batch; else a backward pass of the batch
            tells, whose graph is there.
        tap: of the batch that they are of.
        result: of the batch, with its graph.

    Returns:
        why the tap does not see a parameter's gradients, by its name: where samples
        compute something together, which is the same beside any others; nothing where
        a run or its backward pass fails, as that of the whole batch will.

    Raises:
        FisherpruneError: where a sample's result is another beside others.
    """
    seeing, known = tap, dict(tap.known)
    try:
        if few.size * SMALL < tap.samples:
            pair = few.last(2)
            given = tap.parameters, pair.tensors, pair.size, tap.report, op
            seeing = LayerTap(*given, known=known)
            with seeing.forward():
                result = forward(task.model, pair).result
        before, check = set(seeing.refused), ReachCheck(seeing.samples)
        seeing.check_samples(result, lambda _: check)
        if not check.reached or not any(read_at_once(check.reached)):
            return {}
        seeing.check_samples(result, LargeReachCheck)
    except (FisherpruneError, OwnGradientsError):
        raise
    except Exception:
        return {}
    reached = {n: why for n, why in seeing.refused.items() if n not in before}
    if reached:
        check_beside(op, task, forward, few, SAME)
    return reached


def check_beside(
    op: str, task: Task, forward: Forward, few: Batch, tolerance: float = NEARLY
) -> None:
    """Refuse where a sample's result is another beside others than beside itself.

    Both are of the same shapes, so rounding is the same, but where values decide which
    rows lie together.

    Args:
        op: named in errors.
        task: with the model.
        forward: the pass.
        few: of the samples, as no run has changed them.
        tolerance: by which results of float32 may differ.

    Raises:
        FisherpruneError: where it is.
    """
    try:
        ran = forward(task.model, few.last(few.size))
        copies = {
            i: forward(task.model, few.alone(i, few.size)) for i in (0, few.size - 1)
        }
    except Exception:  # a batch of another size runs
        return
    rounding = tolerance_of(ran.result)
    allowed, size = tolerance if rounding <= 1e-3 else rounding, None
    for i, own in copies.items():
        differ = torch.zeros((), dtype=torch.bool)
        if own.outputs is not None and ran.outputs is not None:
            size = ran.outputs[i].detach().float().norm()
            differ = _differs(own.outputs[i], ran.outputs[i], allowed)
        if differ or _differs(own.result[i], ran.result[i], allowed, size):
            raise FisherpruneError(
                f"{op}: samples mix: what comes of a sample depends on the others of "
                "its batch: leave out what is computed from the whole batch, as its "
                "statistics, or a loss that balances the load of experts or compares "
                "samples"
            )


def check_rows(
    tap: LayerTap, result: Tensor, kind: Callable[[int], RowCheck] = RowCheck
) -> None:
    """Run ``LayerTap.check_samples``.

    Raises:
        FisherpruneError: where a backward pass fails.
    """
    with backward(tap.op):
        tap.check_samples(result, kind)


def _differs(
    one: Tensor, other: Tensor, tolerance: float, least: Tensor | None = None
) -> Tensor:
    if one.shape != other.shape:
        return torch.ones((), dtype=torch.bool)
    one, other = one.detach().float(), other.detach().float()
    size = other.norm() if least is None else other.norm() + least
    return (one - other).norm() > tolerance * size


def tolerance_of(outputs: Tensor) -> float:
    """Return the relative error that other kernels for one sample may cause."""
    if outputs.dtype not in (torch.float32, torch.float64):
        return 5e-2
    cuda, cpu = ("cuda.matmul", "cudnn.conv"), ("mkldnn.matmul", "mkldnn.conv")
    reduced = {"tf32": 1e-2, "bf16": 5e-2}
    return max(
        reduced.get(attrgetter(f"{backend}.fp32_precision")(torch.backends), 1e-3)
        for backend in (cuda if outputs.is_cuda else cpu)
    )
