"""The batches of all ranks, on each of them: for what ranks can't share out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fisherprune.statistics.batches import Batches, check_iterable
from fisherprune.statistics.passes import Task
from fisherprune.statistics.ranks import meet, number_of, reaching
from fisherprune.statistics.structure import moved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STEP = "the next batch"


class RankBatches:
    """Batches of all ranks in turn, those of the first rank first.

    All ranks must read them together. Each batch is sent when its turn comes.
    """

    def __init__(self, batches: Batches, group: ProcessGroup) -> None:
        self.batches, self.group = batches, group

    def __iter__(self) -> Iterator[Any]:
        for turn in range(self.group.size()):
            yield from (
                self._received(turn) if turn != self.group.rank() else self._own()
            )

    def _own(self) -> Iterator[Any]:
        for batch in self.batches:
            packed = pickle.dumps(moved(batch, torch.device("cpu")))
            meet(self.group, STEP, True)
            self._send(self.group.rank(), packed)
            yield batch
        meet(self.group, STEP, False)

    def _received(self, turn: int) -> Iterator[Any]:
        while meet(self.group, STEP)[turn]:
            yield pickle.loads(self._send(turn, None))

    def _send(self, turn: int, packed: bytes | None) -> bytes:
        content = [packed]
        with reaching():
            torch.distributed.broadcast_object_list(
                content, src=number_of(self.group, turn), group=self.group
            )
        return content[0] or b""


def on_every_rank(task: Task) -> Task:
    """Return the task of a rank that passes over the batches of all ranks by itself."""
    if task.process_group is None:
        return task
    check_iterable(task.batches, task.losses is None)
    every: Any = RankBatches(task.batches, task.process_group)
    batches = iter(every) if isinstance(task.batches, Iterator) else every
    return replace(task, batches=batches, process_group=None, every_rank=True)
