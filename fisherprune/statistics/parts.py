"""Passes over the batches that sum up a part of the parameters at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from fisherprune.errors import FieldError, FisherpruneError
from fisherprune.statistics.key import hash_of
from fisherprune.statistics.structure import tensors_in

if TYPE_CHECKING:
    from fisherprune.statistics.batches import Batch
    from fisherprune.statistics.passes import Task

T = TypeVar("T")
V = TypeVar("V")


class Part:
    """Parameters that a pass sums up; passes before and after it sum up the others.

    Args:
        names: of the parameters.
        number: of the pass, from 0.
        count: how many passes there are.
        hashes: of the batches, which the first pass writes down.
    """

    def __init__(
        self, names: frozenset[str], number: int, count: int, hashes: list[str]
    ) -> None:
        self.names, self.number, self.count = names, number, count
        self.hashes, self.read = hashes, 0

    def of(self, named: Mapping[str, V]) -> dict[str, V]:
        """Return the entries of the parameters."""
        return {name: value for name, value in named.items() if name in self.names}

    def see(self, op: str, batch: Batch) -> None:
        """Refuse a batch that is another than in the first pass."""
        found = hash_of(*tensors_in(batch.content))
        if not self.number:
            self.hashes.append(found)
        elif self.hashes[self.read : self.read + 1] != [found]:
            raise self._other(op, f"batch {self.read} is another")
        self.read += 1

    def end(self, op: str) -> None:
        """Refuse where the pass had fewer batches than the first."""
        if self.read < len(self.hashes):
            raise self._other(op, f"of {len(self.hashes)} batches came {self.read}")

    def _other(self, op: str, what: str) -> FisherpruneError:
        return FisherpruneError(
            f"{op}: batches must hold the same samples in each of the {self.count} "
            f"passes that max_accumulator_bytes leads to, but in pass {self.number} "
            f"{what}; a DataLoader with a generator of its own, or random "
            "augmentation, draws others each time: make a list of its batches"
        )


def in_parts(
    op: str, task: Task, bytes_a_weight: int, run: Callable[[Task], T]
) -> list[T]:
    """Run a pass for as many parameters at a time as the settings have memory for.

    Args:
        op: named in errors.
        task: of the pass.
        bytes_a_weight: that sums take.
        run: the pass, of a task whose ``part`` it sums up.

    Returns:
        What each run returned.

    Raises:
        FisherpruneError: where a parameter alone needs more, or batches can't be read
            several times, or are others each time.
    """
    sizes = {n: p.numel() * bytes_a_weight for n, p in task.parameters.items()}
    parts = _parts(sizes, task.settings.max_accumulator_bytes)
    if len(parts) == 1:
        return [run(task)]
    if isinstance(task.batches, Iterator):
        wanted = (
            "a list, a DataLoader or the like: max_accumulator_bytes leads to "
            f"{len(parts)} passes over them"
        )
        raise FieldError("batches", wanted, type(task.batches).__name__)
    hashes: list[str] = []
    found = []
    for number, names in enumerate(parts):
        part = Part(names, number, len(parts), hashes)
        found.append(run(replace(task, part=part)))
        part.end(op)
    return found


def in_order(task: Task, named: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join what runs found, in the order of the task's parameters."""
    every = {name: tensor for each in named for name, tensor in each.items()}
    return {name: every[name] for name in task.parameters}


def _parts(sizes: Mapping[str, int], most: int | None) -> list[frozenset[str]]:
    """Share names out over few parts of at most so many bytes: the largest first."""
    if most is None:
        return [frozenset(sizes)]
    parts: list[tuple[set[str], int]] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        size = sizes[name]
        if size > most:
            wanted = (
                f"at least {size}, the bytes of the sums of {name!r}, or None with "
                "offload, where no sum is kept beside the parameters"
            )
            raise FieldError("max_accumulator_bytes", wanted, most)
        for i, (names, used) in enumerate(parts):
            if used + size <= most:
                parts[i] = names | {name}, used + size
                break
        else:
            parts.append(({name}, size))
    return [frozenset(names) for names, _ in parts]
