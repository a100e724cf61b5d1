"""The processes that share a run: each takes its part of every batch.

A rank normalizes, adds up gradients and counts as if it had seen the whole batch, so a
run of several ranks is that of one process up to rounding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    Store,
    rendezvous,
)

from fisherprune.data.dataset import Dataset
from fisherprune.errors import FisherpruneError
from fisherprune.statistics.ranks import RankError, check_same, reaching, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long ranks wait for another one that lives: for the first to load data, say."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each rank."""


class Job(NamedTuple):
    """What a process knows of the ranks that it is one of."""

    number: int
    size: int
    local: int
    """Its number on this machine, which chooses its GPU."""


def job_here() -> Job | None:
    """Return the job that this process is a rank of; None where it is by itself."""
    if distributed.is_available() and distributed.is_initialized():
        number, size = distributed.get_rank(), distributed.get_world_size()
        return Job(number, size, int(os.environ.get("LOCAL_RANK", number)))
    if any(name not in os.environ for name in ENVIRONMENT):
        return None
    return Job(*(int(os.environ[name]) for name in ENVIRONMENT[:3]))


@contextmanager
def joined(job: Job | None, device: torch.device) -> Iterator[Ranks]:
    """Yield the ranks of a job, in whose process group this process is meanwhile.

    Raises:
        FisherpruneError: where the others can't be reached.
    """
    if job is None or job.size == 1:
        yield Ranks()
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    ours = not distributed.is_initialized()
    if ours:
        with reaching():
            distributed.init_process_group(
                "nccl" if cuda else "gloo",
                store=PrefixStore(f"run {next(_runs)}", _store()),
                rank=job.number,
                world_size=job.size,
                timeout=PATIENCE,
            )
    try:
        yield Ranks(distributed.group.WORLD)
    finally:
        if ours:  # others that wait for this one stop
            distributed.destroy_process_group()


_runs = count()
"""Numbers the runs of a job: each meets under names of its own."""


@cache
def _store() -> Store:
    """Return where the ranks of this job find each other, for as long as it lives."""
    return next(rendezvous("env://"))[0]


@dataclass(frozen=True)
class Share:
    """What a rank takes of a batch.

    Attributes:
        rows: its images. Where there are fewer than ranks, some take the first one,
            which does not count for them.
        count: how many of them count.
        total: images of the whole batch.
        group: of the ranks; None where there is one.
    """

    rows: slice
    count: int
    total: int
    group: ProcessGroup | None

    def batchnorm(self) -> AbstractContextManager:
        """Return a context in which BatchNorm sees the whole batch."""
        if self.group is None:
            return nullcontext()
        # Imported late: it imports the compiler, which takes as long as PyTorch.
        from fisherprune.train.batchnorm import WholeBatchNorm

        return WholeBatchNorm(self.group, self.count > 0)

    def weight(self, loss: Tensor) -> Tensor | None:
        """Return what the gradient of a mean over the share counts in that of all."""
        if self.group is None:
            return None
        return torch.full_like(loss.detach(), self.count / self.total)


class Ranks:
    """All ranks of a run, seen from one of them.

    Attributes:
        group: of all; None where the run has one process, for which all that follows
            does nothing.
        number: of this rank, from 0.
        size: how many there are.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.number = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.number == 0

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Let all ranks leave the context well, or none; they know that they are many.

        Raises:
            FisherpruneError: where another rank fails.
        """
        if self.group is None:
            yield
            return
        with together(self.group), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ranks of torch.distributed")
            yield

    def in_turn(self, call: Callable[[], T]) -> T:
        """Return what a call returns that the first rank does before the others.

        Raises:
            FisherpruneError: where the call fails on another rank.
        """
        if self.group is None:
            return call()
        with together(self.group):
            found = [call()] if self.first else []
        with together(self.group):
            return found[0] if found else call()

    def from_first(self, call: Callable[[], T]) -> T:
        """Return on every rank what a call returns on the first one alone.

        Raises:
            FisherpruneError: where the call fails.
        """
        if self.group is None:
            return call()
        with together(self.group):
            box = [call() if self.first else None]
        with reaching():
            distributed.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]  # type: ignore[return-value]

    def alike(self, error: FisherpruneError) -> FisherpruneError:
        """Return an error that all ranks find, for the first one to tell."""
        return (
            error if self.first else RankError(f"process_group: rank 0 failed: {error}")
        )

    def share(self, total: int) -> Share:
        """Return what this rank takes of a batch: images that stand side by side."""
        start, stop = self._bounds(total)
        rows = slice(start, stop) if start < stop else slice(1)
        return Share(rows, stop - start, total, self.group)

    def scored(self, images: Dataset, group_size: int) -> Dataset:
        """Return what this rank scores on: whole groups that stand side by side."""
        groups = -(-len(images) // group_size)
        start, stop = (i * group_size for i in self._bounds(groups))
        return images.subset(torch.arange(len(images))[start:stop])

    def _bounds(self, total: int) -> tuple[int, int]:
        ends = (self.number, self.number + 1)
        start, stop = (end * total // self.size for end in ends)
        return start, stop

    def deal(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield every so many of some batches: each goes to one rank."""
        return islice(batches, self.number, None, self.size)

    def add_up(self, sums: Iterable[Tensor]) -> None:
        """Set tensors to their sums over the ranks, the same bits on each."""
        if self.group is not None:
            with reaching():
                for each in sums:
                    distributed.all_reduce(each, group=self.group)

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set gradients to their sums over the ranks, all in one message.

        A parameter that no rank has a gradient of stays without.
        """
        if self.group is None:
            return
        trained = [p for p in parameters if p.requires_grad]
        there = [p.grad is not None for p in trained]
        flat = [_flat(p) for p in trained]
        message = torch.cat([flat[0].new_tensor(there, dtype=flat[0].dtype), *flat])
        self.add_up([message])
        known, *sums = message.split([len(trained), *map(len, flat)])
        anywhere = there if all(there) else known.tolist()
        for p, total, some in zip(trained, sums, anywhere, strict=True):
            if p.grad is not None:
                p.grad.copy_(total.view_as(p))
            elif some:
                p.grad = torch.empty_like(p).copy_(total.view_as(p))

    def check_same(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Refuse tensors whose sums differ from rank to rank.

        Raises:
            FisherpruneError: on all ranks alike.
        """
        if self.group is not None:
            every: list[str] = [""] * self.size
            with reaching():
                distributed.all_gather_object(every, _sums(tensors), group=self.group)
            check_same(self.group, what, every)


ALONE = Ranks()
"""The only process of a run."""


def _flat(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(parameter).flatten() if grad is None else grad.flatten()


def _sums(tensors: Iterable[Tensor]) -> str:
    totals: Sequence[Tensor] = [t.detach().double().sum() for t in tensors]
    return f"sums {torch.stack([*totals]).tolist()}"
