"""The kernel of products of warpgroups beside the one that it may replace."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks import moments
from benchmarks.gpu.measure import (
    TF32_KERNEL,
    Goal,
    NotHere,
    Row,
    device_times,
    precision,
    row,
)
from benchmarks.harness import verify
from fisherprune import ops
from fisherprune.ops import kernels

SWITCH = "FISHERPRUNE_CUDA_WGMMA"
LAYERS = [
    layer
    for layer in moments.MODELS["ResNet18"]
    if layer.kernel == 3 and layer.stride == 1 and layer.channels >= 16
]
"""The 3 x 3 convolutions that keep the size of their images."""


@contextmanager
def switched(value: str) -> Iterator[None]:
    """Set the variable that chooses the kernel; put back what was there."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def require(device: str) -> None:
    """Say why the two kernels can't be compared, if they can't.

    Raises:
        NotHere: where the device or the build has one of them alone.
    """
    if "9.0a" not in kernels.CUDA_ARCHS:
        raise NotHere('needs kernels built with TORCH_CUDA_ARCH_LIST="8.0;9.0;9.0a"')
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu or torch.cuda.get_device_capability(device) != (9, 0):
        raise NotHere("needs a device of compute capability 9.0")


def compare(
    device: str,
    batch: int = 512,
    layers: Sequence[moments.Layer] = LAYERS,
    rounds: int = 20,
    check: Callable[[str], None] = require,
) -> Iterator[Row]:
    """Verify both kernels on each layer, then time them in turn."""
    check(device)
    for layer in layers:
        input, grad, weight = layer.operands(batch, device)
        truth = moments.true_moments(layer, input, grad, weight)
        times: dict[str, list[float]] = {"0": [], "1": []}
        errors = {}
        for value in [*times] * 4:
            with precision("tf32"), switched(value):
                sums, call = prepared(layer, input, grad, weight)
                call()
                name = f"{layer}, {SWITCH}={value}"
                verify(name, list(sums), list(truth), tolerance=TF32_KERNEL)
                errors[value] = errors_of(sums, truth)
                times[value] += device_times(call, device, rounds // 4)
        yield row(
            f"grad_moments, {layer}, batch {batch}: present kernel over that of "
            "warpgroup products",
            "x",
            [old / new for old, new in zip(*times.values(), strict=True)],
            Goal(1, at_most=False),
            microseconds=statistics.median(times["1"]),
            present_microseconds=statistics.median(times["0"]),
            error=errors["1"],
            present_error=errors["0"],
        )


def prepared(
    layer: moments.Layer, input: Tensor, grad: Tensor, weight: torch.Size
) -> tuple[Tensor, Callable[[], None]]:
    """Return fresh sums and the call that adds to them."""
    sums = torch.zeros(2, *weight, device=input.device)
    return sums, lambda: ops.grad_moments(input, grad, *sums, **layer.options())


def errors_of(sums: Tensor, truth: Tensor) -> list[float]:
    """Return the relative errors of sum and sum_sq, norm-wise."""
    pairs = zip(sums.double(), truth, strict=True)
    return [((s - t).norm() / t.norm()).item() for s, t in pairs]
