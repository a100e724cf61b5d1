"""Shared equipment of the benchmarks: verify, then time side by side.

A benchmark is three steps::

    times = race({"ours": f, "peer": g}, check, device=device)  # checks, then times
    rows = [{"what": name, **t.row()} for name, t in times.items()]
    finish("topk", rows, ceilings(device), device, path)        # benchmarks.record

Times are wall-clock milliseconds that include launches and, on CUDA, the wait for the
device, that is what a caller pays.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

FLUSH_BYTES = 512 << 20  # several times the L2 cache of any GPU
LEAST_MS = 2.0  # a shorter call is repeated until one sample lasts this long

Name = TypeVar("Name", bound=Hashable)  # of a competitor


class WrongResult(AssertionError):
    """A competitor computed something else than it must; it is not timed."""


# --- verify ---------------------------------------------------------------------------


def verify(what: str, got: Any, expected: Any, *, tolerance: float = 0.0) -> None:
    """Raise unless ``got`` equals ``expected``; tensors, numbers, and nests of them.

    Args:
        what: named in the message.
        got: the result to judge.
        expected: the truth, of the same structure (lists and tuples alike).
        tolerance: for floating point, the largest relative error in the 2-norm,
            ``|got - expected| <= tolerance * |expected|`` in float64; 0 asks for equal
            values. Integers and bools must always be equal.

    Raises:
        WrongResult: where anything differs in structure, shape, dtype or value, and
            where either side holds a NaN.
    """
    if isinstance(expected, Tensor):
        _verify_tensor(what, got, expected, tolerance)
    elif isinstance(expected, Mapping):
        _verify_keys(what, got, expected)
        for key, value in expected.items():
            verify(f"{what}[{key!r}]", got[key], value, tolerance=tolerance)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        if not isinstance(got, Sequence) or len(got) != len(expected):
            raise WrongResult(f"{what}: must be a sequence of {len(expected)} results")
        for i, (one, truth) in enumerate(zip(got, expected, strict=True)):
            verify(f"{what}[{i}]", one, truth, tolerance=tolerance)
    elif isinstance(expected, float):
        one, truth = (torch.as_tensor(x, dtype=torch.float64) for x in (got, expected))
        _verify_tensor(what, one, truth, tolerance)
    elif got != expected:
        raise WrongResult(f"{what}: must be {expected!r}, got {got!r}")


def _verify_keys(what: str, got: Any, expected: Mapping) -> None:
    if not isinstance(got, Mapping) or list(got) != list(expected):
        raise WrongResult(f"{what}: must be a mapping with keys {list(expected)}")


def _verify_tensor(what: str, got: Any, expected: Tensor, tolerance: float) -> None:
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        came = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise WrongResult(f"{what}: must have shape {list(expected.shape)}, got {came}")
    exact = tolerance == 0 or not expected.is_floating_point()
    if exact and got.dtype != expected.dtype:
        raise WrongResult(f"{what}: must be {expected.dtype}, got {got.dtype}")
    got, expected = got.detach(), expected.detach().to(got.device)
    if got.isnan().any() or expected.isnan().any():
        raise WrongResult(f"{what}: holds NaN")
    if exact:
        if not torch.equal(got, expected):
            wrong = int((got != expected).sum())
            raise WrongResult(f"{what}: {wrong} of {got.numel()} entries differ")
        return
    truth = expected.double()
    error, scale = (got.double() - truth).norm().item(), truth.norm().item()
    if not error <= tolerance * scale:
        raise WrongResult(
            f"{what}: relative error {error / scale if scale else math.inf:.2e} "
            f"is above {tolerance:.0e}"
        )


# --- time -----------------------------------------------------------------------------


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one sample a round."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Return the q-quantile of the samples, linear between neighbours."""
        return torch.tensor(self.samples, dtype=torch.float64).quantile(q).item()

    @property
    def median(self) -> float:
        """The middle sample."""
        return self.quantile(0.5)

    def row(self, **more: Any) -> dict[str, Any]:
        """Return the columns of a result table: median and quartiles."""
        times = {
            "ms": self.median,
            "q1": self.quantile(0.25),
            "q3": self.quantile(0.75),
        }
        return {**times, "rounds": len(self.samples), **more}


class ColdCache:
    """Fills a GPU's cache with other data.

    It ends with a read: what is written stays in the cache until something else needs
    the place, so that the call timed next would pay for the way to memory.
    """

    def __init__(self, device: str | torch.device):
        self.other = torch.empty(FLUSH_BYTES // 4, device=device)

    def fill(self, times: int = 1) -> None:
        """Write ``times`` as much as the cache holds and more, read it once."""
        for _ in range(times):
            self.other.zero_()
        self.other.sum()


class _Stopwatch:
    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self.cache = ColdCache(device) if self.device.type == "cuda" else None

    def sample(self, call: Callable[[], Any], calls: int) -> float:
        """Return milliseconds per call; on CUDA the cache is cold before."""
        if self.cache is not None:
            self.cache.fill()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3 / calls


def race(
    competitors: Mapping[Name, Callable[[], Any]],
    check: Callable[[Name, Any], None],
    *,
    device: str | torch.device = "cpu",
    rounds: int = 7,
    warmup: int = 1,
    repeat: bool = True,
) -> dict[Name, Timing]:
    """Check every competitor's result, then time all of them side by side.

    One sample of each per round, the order rotating from round to round, so that a
    change of the machine's speed meets all alike and ratios hold.

    Args:
        competitors: functions without arguments, by name (any key of a dict).
        check: called as ``check(name, result)`` before anything is timed; must raise
            (``verify`` does) where the result is wrong.
        device: where the functions run; it is waited for around every sample.
        rounds: samples per competitor.
        warmup: calls before the first sample, after the checked one.
        repeat: whether a sample is several calls where one is short; not where other
            processes must make as many.

    Raises:
        WrongResult: from ``check``.
    """
    for name, call in competitors.items():
        check(name, call())
    watch = _Stopwatch(device)
    calls = {}
    for name, call in competitors.items():
        once = min(watch.sample(call, 1) for _ in range(max(1, warmup)))
        # Repetitions would find their data in the GPU's cache.
        short = repeat and once < LEAST_MS and watch.cache is None
        calls[name] = math.ceil(LEAST_MS / max(once, 1e-3)) if short else 1
    samples: dict[Name, list[float]] = {name: [] for name in competitors}
    names = list(competitors)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(watch.sample(competitors[name], calls[name]))
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for its next allocations (glibc only).

    A call of a few milliseconds that returns megabytes takes twice as long where the
    system must hand out new pages first, and glibc gives pages back or keeps them by
    what happens to lie above them: one competitor pays, its neighbour does not.
    """
    trim_threshold, mmap_max = -1, -4  # of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


def give_back_memory() -> None:
    """Return all freed memory of this process to the system (glibc only)."""
    ctypes.CDLL(None).malloc_trim(0)


def ratios(times: Mapping[str, Timing], ours: str) -> dict[str, float]:
    """Return how many times longer than ``ours`` each competitor takes, by medians."""
    return {name: t.median / times[ours].median for name, t in times.items()}


def ceilings(
    device: str | torch.device = "cpu", *, megabytes: int = 256, rounds: int = 7
) -> dict[str, float]:
    """Measure what the machine can do now: sgemm, memory copy, memory read.

    Returns:
        ``sgemm_gflops`` (float32, no TF32), ``copy_gbs`` (bytes read plus written) and
        ``read_gbs`` (a sum), the best of ``rounds`` each.
    """
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    x = torch.ones(megabytes << 18, device=device)
    y = torch.empty_like(x)
    calls = {
        "sgemm": lambda: torch.mm(a, b),
        "copy": lambda: y.copy_(x),
        "read": lambda: x.sum(),
    }

    def check(name: str, result: Tensor) -> None:
        if name == "read":
            # A tree of more than 2^24 ones may round.
            verify(name, result, torch.tensor(float(x.numel())), tolerance=1e-5)
        elif name == "copy":
            verify(name, result, x)
        else:
            row = a[:1].double() @ b.double()
            verify(name, result[:1], row, tolerance=1e-5)

    times = race(calls, check, device=device, rounds=rounds)
    best = {name: min(t.samples) * 1e6 for name, t in times.items()}  # ns
    size = x.numel() * x.element_size()
    return {
        "sgemm_gflops": 2 * n**3 / best["sgemm"],
        "copy_gbs": 2 * size / best["copy"],
        "read_gbs": size / best["read"],
    }


def peak_extra_bytes(
    call: Callable[[], Any], device: str | torch.device = "cpu"
) -> int:
    """Return by how much ``call`` raises the memory in use at its highest point.

    On the CPU it is the peak resident size of the process (Linux and glibc only: VmHWM,
    reset through ``/proc/self/clear_refs``), on CUDA that of torch's allocator. The
    result of the call counts.
    """
    synchronize(device)
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    give_back_memory()  # or the call reuses what was freed before
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) << 10
