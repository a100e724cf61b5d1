"""Where the time goes: kernels by torch.profiler, our kernels' counters by ncu."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks import end_to_end, peers
from benchmarks.gpu.measure import Found, NotHere, precision, row
from benchmarks.gpu.networks import verify_network
from benchmarks.gpu.programs import find_program, lines_of, start
from benchmarks.harness import synchronize

MOST = 30  # kernels of a table
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "launch__registers_per_thread",
)
"""What ncu counts of every launch."""


def profile(
    device: str,
    name: str = "resnet18",
    batch: int = 512,
    count: int = 4,
    rounds: int = 5,
) -> Iterator[Found]:
    """List the kernels of one pass, ours and plain, by their time.

    And how much of a pass the device computes: less where it waits for the host.
    """
    model = end_to_end.network(name, device)
    x, y = end_to_end.images(batch * count, 32, device)
    verify_network(model, x[:8], y[:8])
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    calls = {
        "gradient_moments": partial(peers.fisherprune_pass, model, batches),
        end_to_end.PLAIN: partial(peers.plain_pass, model, batches),
    }
    for what, call in calls.items():
        place = f"{name}, {count} batches of {batch}, TF32: {what}"
        with precision("tf32"):
            found = kernel_times(call, device)
            seconds = [seconds_of(call, device) for _ in range(rounds)]
        launches = sum(calls for _, calls, _ in found) / count
        busy = [sum(us for us, _, _ in found) / 1e6 / s for s in seconds]
        numbers = [
            row(f"{place}: launches of a batch", "", [launches]),
            row(f"{place}: time of all kernels over that of the pass", "x", busy),
        ]
        yield {"profile": {place: kernel_table(found)}, "rows": numbers}


Times = list[tuple[float, int, str]]
"""Microseconds, launches and name of each kernel."""


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Return how long a call takes when nothing is recorded."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def kernel_times(call: Callable[[], object], device: str) -> Times:
    """Return the kernels of a call, the longest first."""
    on_gpu = torch.device(device).type == "cuda"
    kind = "CUDA" if on_gpu else "CPU"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    call()  # chooses algorithms and workspaces
    synchronize(device)
    with torch.profiler.profile(activities=activities) as recorded:
        call()
        synchronize(device)
    times = [
        (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key)
        for e in recorded.key_averages()
        if e.device_type.name == kind
    ]
    return sorted(times, reverse=True)


def kernel_table(times: Times) -> list[dict[str, Any]]:
    """Return the kernels that take the most of the time."""
    whole = sum(us for us, _, _ in times)
    return [
        {"us": us, "share": us / whole, "calls": calls, "kernel": kernel[:100]}
        for us, calls, kernel in times[:MOST]
        if us
    ]


def ncu(device: str) -> Iterator[Found]:
    """Count what each launch of grad_moments on the largest layers does, as CSV.

    Raises:
        NotHere: where ncu is not installed or may not count.
    """
    command = [find_program("ncu"), "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS)]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:fisherprune"]
    command += [sys.executable, "-m", "benchmarks.gpu.cases", "--largest"]
    process = start([*command, "--device", device])
    lines = list(lines_of(process))
    if any("ERR_NVGPUCTRPERM" in line for line in lines):
        raise NotHere("ncu may not read the counters of this device")
    if process.returncode:
        sys.exit(f"ncu: exit {process.returncode}")
    yield {"ncu": [line.rstrip() for line in lines if line.startswith('"')]}
