"""Equipment of the GPU benchmarks: rows with goals, precision, device time, ceilings.

All of it runs on the CPU too, where the device's time is that of the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import ColdCache, Timing, ceilings, verify

FLUSHES = 6  # keep the device busy while the host launches what is timed
TF32_KERNEL = 2e-3  # relative error of one product of TF32 operands, summed in float32
# Of a whole network, where TF32 turns about one ReLU in a thousand over: this catches
# what is wrong, not what is rounded. The rows carry the error that was found.
TF32_NETWORK = 0.3

Row = dict[str, Any]
"""A number: name, value (the median), unit, n, q1 and q3, with a goal target and holds.
"""
Found = dict[str, Any]
"""What a step adds to the record: dicts and lists by group, as rows and ceilings."""


class NotHere(Exception):
    """The machine lacks what a step needs; no failure."""


@dataclass(frozen=True)
class Goal:
    """What a number must keep at least, and what it should reach."""

    limit: float
    at_most: bool = True
    aim: float | None = None

    def holds(self, value: float) -> bool:
        """Say whether ``value`` keeps the limit."""
        return value <= self.limit if self.at_most else value >= self.limit

    def columns(self, value: float) -> Row:
        """Return the columns that judge ``value``."""
        sign = "<=" if self.at_most else ">="
        columns: Row = {"target": f"{sign} {self.limit:g}", "holds": self.holds(value)}
        return columns if self.aim is None else {**columns, "aim": self.aim}


def row(
    name: str,
    unit: str,
    samples: Sequence[float],
    goal: Goal | None = None,
    **more: object,
) -> Row:
    """Return one number: the median of ``samples``, how many, their quartiles."""
    spread = Timing(tuple(samples))
    columns: Row = {
        "name": name,
        "value": spread.median,
        "unit": unit,
        "n": len(samples),
    }
    columns |= {"q1": spread.quantile(0.25), "q3": spread.quantile(0.75)}
    return columns | (goal.columns(spread.median) if goal else {}) | more


def ratios(above: Timing, below: Timing) -> list[float]:
    """Return the ratio of every round."""
    return [a / b for a, b in zip(above.samples, below.samples, strict=True)]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Let convolutions and matrix products use "tf32" or "ieee"; put back what was."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    backends = conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = name
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


def device_times(call: Callable[[], Any], device: str, rounds: int) -> list[float]:
    """Return microseconds of ``rounds`` calls on the device itself, its cache cold.

    The device is still busy with its cache while the host launches the call, so that
    the events stand around the kernels alone.
    """
    if torch.device(device).type != "cuda":
        return [_wall_microseconds(call) for _ in range(rounds)]
    cache = ColdCache(device)
    times = []
    for _ in range(rounds + 2):  # two to warm up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.fill(FLUSHES)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times[2:]


def _wall_microseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def relative_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return the largest relative error of a parameter, in the 2-norm."""
    return max(
        ((found[n].double() - t.double()).norm() / t.double().norm()).item()
        for n, t in truth.items()
    )


def matmul_rates(device: str, n: int = 8192, rounds: int = 10) -> dict[str, float]:
    """Measure the best rate of square matrix products, in TFLOP/s."""
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    half = a.bfloat16(), b.bfloat16()
    ways = {
        "fp32": ("ieee", (a, b), 1e-5),
        "tf32": ("tf32", (a, b), TF32_KERNEL),
        "bf16": ("ieee", half, 1e-2),
    }
    rates = {}
    for name, (setting, pair, tolerance) in ways.items():
        truth = pair[0][:8].double() @ pair[1].double()
        with precision(setting):
            verify(name, (pair[0] @ pair[1])[:8].float(), truth, tolerance=tolerance)
            times = device_times(partial(torch.mm, *pair), device, rounds)
        rates[f"{name}_matmul_tflops"] = 2 * n**3 / min(times) / 1e6
    return rates


def limits(device: str, n: int = 8192, megabytes: int = 2048) -> dict[str, float]:
    """Measure the ceilings: matrix products, memory copy and read."""
    memory = ceilings(device, megabytes=megabytes)
    return {**matmul_rates(device, n), **{k: memory[k] for k in memory if "gbs" in k}}
