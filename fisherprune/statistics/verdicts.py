"""Conditions on what a device computes, whose verdicts are read when they are there.

To read a value from a GPU is to wait for all that it was given to do, and then it has
nothing to do. So a verdict is copied while it goes on, and read when the copy is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What must hold.

    Attributes:
        holds: bool, one element.
        error: what to raise where it does not.
    """

    holds: Tensor
    error: Callable[[], Exception]


Expect = Callable[[Condition], None]
"""What is called with each condition on the way."""


def at_once(condition: Condition) -> None:
    """Raise the error of a condition that does not hold; it waits for the device."""
    if not condition.holds:
        raise condition.error()


class Verdicts:
    """Reads conditions in order, without a wait for any until ``settle``."""

    def __init__(self) -> None:
        self._open: deque[tuple[Condition, Tensor, torch.cuda.Event | None]] = deque()

    def expect(self, conditions: Iterable[Condition]) -> None:
        """Add conditions, and raise the error of one that is known not to hold."""
        for condition in conditions:
            self._open.append((condition, *_copied(condition.holds)))
        self._read(wait=False)

    def settle(self) -> None:
        """Wait for the device; raise the error of a condition that does not hold."""
        self._read(wait=True)

    def _read(self, wait: bool) -> None:
        while self._open:
            condition, verdict, done = self._open[0]
            if done is not None and not done.query():
                if not wait:
                    return
                done.synchronize()
            self._open.popleft()
            if not verdict.numpy().item():  # on the CPU: nothing waits
                raise condition.error()


def _copied(verdict: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return a copy on the CPU, and what tells when it is there."""
    if not verdict.is_cuda:
        return verdict if verdict.device.type == "cpu" else verdict.cpu(), None
    with torch.cuda.device(verdict.device):
        copy = torch.empty((), dtype=torch.bool, pin_memory=True)
        copy.copy_(verdict.detach().view(()), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    return copy, done
