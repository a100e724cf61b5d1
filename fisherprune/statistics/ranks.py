"""Passes whose batches are shared out over the ranks of a process group.

Each rank passes over its own batches. Ranks meet before sums are added up and at the
end of a call: there each says that it is well, or which error it has. So all of them
stop where one fails, and none waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisherprune.errors import FieldError, FisherpruneError, shown
from fisherprune.statistics.passes import LoopsError, Task

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET = 2**21
"""Elements that are added up at once: a temporary of at most 32 bytes for each."""

PART = 2**21
"""Elements of a tensor whose checksum is found at once."""


class RankError(FisherpruneError):
    """What all ranks know: that one of them failed, or that they differ."""


class _RankLoopsError(LoopsError):
    """Another rank would have to run the model for each sample alone."""


@contextmanager
def together(process_group: ProcessGroup | None) -> Iterator[ProcessGroup | None]:
    """Let all ranks of a group leave the context well, or none.

    Raises:
        FisherpruneError: where it is no process group that this rank is a member of, or
            where another rank fails.
    """
    group = _checked_group(process_group)
    try:
        yield group
    except Exception as error:
        tell(group, error)
        raise
    if group is not None:
        meet(group, "the end")


def _checked_group(group: Any) -> ProcessGroup | None:
    if group is None:
        return None
    distributed = torch.distributed
    known = distributed.is_available() and distributed.is_initialized()
    if not known or not isinstance(group, distributed.ProcessGroup):
        wanted = "None or a ProcessGroup of torch.distributed with this rank in it"
        raise FieldError("process_group", wanted, shown(group))
    return group


def tell(group: ProcessGroup | None, error: Exception) -> None:
    """Tell the other ranks of an error of this one, unless they told it.

    Raises:
        FisherpruneError: where another rank fails and this one does not.
    """
    if group is not None and not isinstance(error, RankError | _RankLoopsError):
        meet(group, "an error", error=error)


def meet(
    group: ProcessGroup, step: str, content: Any = None, error: Exception | None = None
) -> list[Any]:
    """Return what all ranks bring, in order; raise where another one failed."""
    is_loops = isinstance(error, LoopsError)
    text = None if error is None or is_loops else described_error(error)
    every: list[Any] = [None] * group.size()
    with reaching():
        torch.distributed.all_gather_object(
            every, (step, text, is_loops, content), group=group
        )
    failed = [(number_of(group, i), each[1]) for i, each in enumerate(every) if each[1]]
    if failed and not text:
        number, what = failed[0]
        raise RankError(f"process_group: rank {number} failed: {what}")
    if not failed and not is_loops and any(each[2] for each in every):
        raise _RankLoopsError
    if error is None:
        check_same(group, "the step", [each[0] for each in every])
    return [each[3] for each in every]


def described_error(error: Exception) -> str:
    """Return what other ranks are told of an error."""
    kind, text = type(error).__name__, f"{error}"
    return text if isinstance(error, FisherpruneError) and text else f"{kind}: {text}"


@contextmanager
def reaching() -> Iterator[None]:
    """Raise an error after which ranks can't meet where torch.distributed fails."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"process_group: ranks can't be reached: {error}") from error


def number_of(group: ProcessGroup, i: int) -> int:
    """Return the number that the group's rank ``i`` has in the whole job."""
    return torch.distributed.get_global_rank(group, i)


def check_same(group: ProcessGroup, what: str, every: Sequence[str | None]) -> None:
    """Refuse what differs: on all ranks alike, so none tells the others.

    Raises:
        FisherpruneError: where a rank's is not that of the first.
    """
    if text := difference(group, "process_group", what, every):
        raise RankError(text)


def difference(
    group: ProcessGroup, of: str, what: str, every: Sequence[str | None]
) -> str | None:
    """Return the error of what differs; None where it is the same on all ranks.

    Args:
        group: of the ranks.
        of: what the error begins with.
        what: that must be the same.
        every: what each rank has, in order.
    """
    first = every[0]
    for i, each in enumerate(every):
        if each != first:
            numbers = number_of(group, 0), number_of(group, i)
            return (
                f"{of}: {what} must be the same on all ranks, got "
                f"{(first or 'none')[:80]} on rank {numbers[0]} and "
                f"{(each or 'none')[:80]} on rank {numbers[1]}"
            )
    return None


def checksum(tensor: Tensor) -> str:
    """Return sums of the bits that depend on their order, and on nothing else."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for part in flat.view(kinds.get(flat.element_size(), torch.uint8)).split(PART):
        bits = part.long()
        places = torch.arange(1, 1 + len(bits), device=bits.device)
        total = total * 31 + torch.stack([bits.sum(), (bits * places).sum()])
    return "checksum {:x}-{:x}".format(*(n % 2**64 for n in total.tolist()))


def own_name(name: str, group: ProcessGroup | None) -> str:
    """Return the name of a random stream whose numbers differ from rank to rank."""
    rank = 0 if group is None else group.rank()
    return f"{name} of rank {rank}" if rank else name


def gathered(task: Task, op: str, content: Any) -> list[Any]:
    """Return what every rank brings to a step, in order; without a group, it alone.

    Raises:
        FisherpruneError: where another rank failed.
    """
    group = task.process_group
    return [content] if group is None else meet(group, op, content)


def counted(op: str, counts: Sequence[Sequence[float]]) -> list[float]:
    """Add up counts of all ranks, the first of which is that of samples.

    Raises:
        FisherpruneError: where there is no sample.
    """
    totals = [sum(each) for each in zip(*counts, strict=True)]
    if not totals[0]:
        raise no_samples(op)
    return totals


def no_samples(op: str) -> FisherpruneError:
    """Return the error that no batch came."""
    return FisherpruneError(f"{op}: batches must hold samples, got none")


def copy_first_(task: Task, tensors: Sequence[Tensor]) -> None:
    """Set tensors to those of the first rank: others may round another way.

    It must follow a ``gathered``, as ``add_up_`` must.
    """
    if (group := task.process_group) is None:
        return
    with reaching(), torch.no_grad():
        for tensor in tensors:
            sent = tensor.to(device_between(group, tensor)).contiguous()
            torch.distributed.broadcast(sent, number_of(group, 0), group)
            tensor.copy_(sent)


def add_up_(task: Task, tensors: Sequence[Tensor]) -> None:
    """Set tensors of one dtype to their sums over the ranks, the same bits on each.

    Terms are added in float64 in the order of the ranks, each element on one of them.
    It must follow a ``gathered``, which sees that all ranks got there.
    """
    if (group := task.process_group) is None:
        return
    with reaching(), torch.no_grad():
        loose = [t for t in tensors if not t.is_contiguous()]
        for tensor in loose:
            dense = tensor.contiguous()
            _add_flat_(group, [dense.view(-1)])
            tensor.copy_(dense)
        _add_flat_(group, [t.view(-1) for t in tensors if t.is_contiguous()])


def _add_flat_(group: ProcessGroup, flat: Sequence[Tensor]) -> None:
    bucket: list[Tensor] = []
    room = BUCKET
    for tensor in flat:
        while tensor.numel():
            bucket.append(tensor[:room])
            tensor, room = tensor[room:], room - bucket[-1].numel()
            if not room:
                _add_bucket_(group, bucket)
                bucket, room = [], BUCKET
    if bucket:
        _add_bucket_(group, bucket)


def _add_bucket_(group: ProcessGroup, bucket: Sequence[Tensor]) -> None:
    """Send each rank a share of the bucket, of which it returns the sum to all."""
    device, size = device_between(group, bucket[0]), group.size()
    sent = torch.cat([piece.to(device) for piece in bucket])
    sent = pad(sent, (0, -len(sent) % size))
    came = torch.empty_like(sent)
    torch.distributed.all_to_all_single(came, sent, group=group)
    first, *others = came.view(size, -1)
    total = first.double()
    for row in others:
        total += row
    rows = list(sent.view(size, -1))
    torch.distributed.all_gather(rows, total.to(sent.dtype), group=group)
    place = 0
    for piece in bucket:
        piece.copy_(sent[place : place + len(piece)])
        place += len(piece)


def device_between(group: ProcessGroup, tensor: Tensor) -> torch.device:
    """Return the device between whose memories the ranks of a group send."""
    backend = torch.distributed.get_backend(group)
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else tensor.device
