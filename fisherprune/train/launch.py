"""Starts the ranks of a run on this machine, as torchrun would, and waits for them."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch import distributed

from fisherprune.errors import FisherpruneError
from fisherprune.statistics.ranks import RankError

T = TypeVar("T")
GRACE = 10.0
"""Seconds that ranks have to end by themselves before they are killed."""
PATIENCE = 60.0
"""Seconds that a rank has to say why others failed, or the system how it ended."""


@dataclass
class _Rank:
    """A rank: its process, the pipe to it, and what it has said."""

    number: int
    process: BaseProcess
    pipe: Connection
    said: tuple[Any, BaseException | None] | None = None
    """What came of its work, and its error."""

    def listen(self) -> None:
        """Take what it says; that it said nothing is an error."""
        try:
            result, error, cause = pickle.loads(self.pipe.recv_bytes())
            if error:
                error.__cause__ = _RankTraceback(cause)
            self.said = result, error
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            code = self.process.exitcode
            error = FisherpruneError(f"rank {self.number} has ended with code {code}")
            self.said = None, error


class _RankTraceback(Exception):
    """Where a rank failed, as the cause of the error that it sent."""


def launched(work: Callable[[], T], count: int) -> T:
    """Return what work returns that ranks do together, each in a process of its own.

    Args:
        work: picklable, as its result; each rank finds itself in its environment.
        count: number of ranks.

    Raises:
        Exception: that a rank raised; the others are stopped.
        KeyboardInterrupt: after Ctrl-C here; that of a rank which tells more.
    """
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    threads = max(1, torch.get_num_threads() // count)
    ranks: list[_Rank] = []
    try:
        for number in range(count):
            mine = {"RANK": str(number), "LOCAL_RANK": str(number), **place}
            ranks.append(_started(number, (mine, threads, work)))
        _listen(ranks)
    except KeyboardInterrupt:
        for rank in ranks:
            rank.process.terminate()  # which is Ctrl-C to it
        _listen(ranks, GRACE)
        raise _error(ranks, KeyboardInterrupt) or KeyboardInterrupt from None
    finally:
        for rank in ranks:
            rank.process.join(GRACE if rank.said else 0)
            rank.process.kill()
            rank.process.join()
    if error := _error(ranks, Exception, RankError) or _error(ranks, BaseException):
        raise error
    return ranks[0].said[0]  # type: ignore[index]


def _started(number: int, arguments: tuple) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fisherprune.train.steps"])
    here, there = context.Pipe()
    process = context.Process(target=_be_rank, args=(there, *arguments))
    process.start()
    there.close()
    return _Rank(number, process, here)


def _listen(ranks: list[_Rank], seconds: float = math.inf) -> None:
    """Return once all ranks have said how they end; some seconds after one failed.

    A rank that fails because another one did may say so first: that one is awaited.
    """
    limit = time.monotonic() + seconds
    while left := {rank.pipe: rank for rank in ranks if rank.said is None}:
        if _error(ranks, BaseException):
            is_cause = _error(ranks, BaseException, RankError)
            grace = GRACE if is_cause else PATIENCE
            limit = min(limit, time.monotonic() + grace)
        patience = limit - time.monotonic()
        ready = wait([*left], None if patience == math.inf else max(0, patience))
        if not ready:
            return
        for pipe in ready:
            left[pipe].listen()  # type: ignore[index]


def _error(
    ranks: list[_Rank],
    kind: type[BaseException],
    but: type[BaseException] | tuple[()] = (),
) -> BaseException | None:
    """Return the first error of a kind that ranks have said."""
    errors = (rank.said[1] for rank in ranks if rank.said)
    found = (e for e in errors if isinstance(e, kind) and not isinstance(e, but))
    return next(found, None)


def _be_rank(
    pipe: Connection, place: dict[str, str], threads: int, work: Callable[[], Any]
) -> None:
    """Work, say what came of it, and end where the process that started this ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it is asked
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    os.environ.update(place)
    torch.set_num_threads(threads)
    said: tuple[Any, BaseException | None, str]
    try:
        said = work(), None, ""
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        said = None, _sendable(error), text
    pipe.send_bytes(pickle.dumps(said))  # send() would leave tensors in this process


def _end_with(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)  # in which it may wait for a rank that is gone
        os.kill(os.getpid(), signal.SIGKILL)


def _sendable(error: BaseException) -> BaseException:
    """Return the error, or what it says where it can't be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # of whatever an exception holds
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
