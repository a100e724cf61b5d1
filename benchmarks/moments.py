"""grad_moments over the layers of ResNet18 and VGG19 for CIFAR, one shape at a time.

Each shape is verified against the float64 reference, then timed beside torch's own
weight gradient, which yields the sum alone. A model's total counts every shape as often
as it occurs: the price of both moments over the price of an ordinary weight gradient.
GFLOP/s count the multiplications and additions of the definition, of which Winograd's
way needs fewer: they may exceed those of sgemm. ``peak MB`` is what a call takes and
gives back; scratch memory that the process keeps for the next call is there before.

    python -m benchmarks.moments [--output PATH] [--rounds N] [--batch N ...] [--plot]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from benchmarks.harness import Timing, ceilings, peak_extra_bytes, race, verify
from benchmarks.record import arguments, at_least_one, finish, program
from fisherprune import ops
from fisherprune.ops import reference

OURS, TORCH = "grad_moments", "weight gradient"
CHUNK = 4  # samples whose gradients the reference holds at a time


class Window(TypedDict, total=False):
    """How a kernel moves over an image: keyword arguments of the op."""

    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A convolution with "same" padding, or a linear layer where ``size`` is 0."""

    channels: int
    outputs: int
    size: int  # height and width of its input
    kernel: int = 3
    stride: int = 1
    count: int = 1  # how often the shape occurs in the model

    def __str__(self) -> str:
        """Name the shape."""
        if not self.size:
            return f"linear {self.channels}-{self.outputs}"
        end = f"/{self.stride}" if self.stride > 1 else ""
        shape = f"{self.channels}-{self.outputs} at {self.size}"
        return f"conv{self.kernel}x{self.kernel}{end} {shape}"

    @property
    def positions(self) -> int:
        """Of the output."""
        return (self.size // self.stride) ** 2 if self.size else 1

    def flops(self, batch: int) -> int:
        """Multiplications and additions of the per-sample gradients."""
        weights = self.channels * self.outputs * self.kernel**2
        return 2 * batch * weights * self.positions

    def operands(self, batch: int, device: str) -> tuple[Tensor, Tensor, torch.Size]:
        """Return random input, output gradient, and the weight's shape."""
        random = torch.Generator().manual_seed(0)
        dims, out = (2, self.size // self.stride) if self.size else (0, 1)
        shapes = (
            (batch, self.channels, *(self.size,) * dims),
            (batch, self.outputs, *(out,) * dims),
        )
        input, grad = (torch.randn(s, generator=random).to(device) for s in shapes)
        weight = (self.outputs, self.channels, *(self.kernel,) * dims)
        return input, grad, torch.Size(weight)

    def options(self) -> Window:
        """Return the op's keyword arguments."""
        if not self.size:
            return {}
        return {"stride": (self.stride,) * 2, "padding": (self.kernel // 2,) * 2}


MODELS = {
    "ResNet18": [
        Layer(3, 64, 32),
        Layer(64, 64, 32, count=4),
        Layer(64, 128, 32, stride=2),
        Layer(64, 128, 32, kernel=1, stride=2),
        Layer(128, 128, 16, count=3),
        Layer(128, 256, 16, stride=2),
        Layer(128, 256, 16, kernel=1, stride=2),
        Layer(256, 256, 8, count=3),
        Layer(256, 512, 8, stride=2),
        Layer(256, 512, 8, kernel=1, stride=2),
        Layer(512, 512, 4, count=3),
        Layer(512, 10, 0, kernel=1),
    ],
    "VGG19": [
        Layer(3, 64, 32),
        Layer(64, 64, 32),
        Layer(64, 128, 16),
        Layer(128, 128, 16),
        Layer(128, 256, 8),
        Layer(256, 256, 8, count=3),
        Layer(256, 512, 4),
        Layer(512, 512, 4, count=3),
        Layer(512, 512, 2, count=4),
        Layer(512, 10, 0, kernel=1),
    ],
}


def true_moments(
    layer: Layer, input: Tensor, grad: Tensor, weight: torch.Size
) -> Tensor:
    """Return sum and sum_sq in float64, one above the other."""
    truth = torch.zeros(2, *weight, dtype=torch.float64, device=input.device)
    for a, d in zip(input.split(CHUNK), grad.split(CHUNK), strict=True):
        reference.grad_moments(a, d, truth[0], truth[1], **layer.options())
    return truth


def weight_gradient(
    layer: Layer, input: Tensor, grad: Tensor, weight: torch.Size
) -> Callable[[], Tensor]:
    """Return torch's way to the sum alone."""
    if not layer.size:
        return lambda: grad.mT @ input
    window, like = layer.options(), input.new_zeros(weight)
    return lambda: torch.ops.aten.convolution_backward(
        grad,
        input,
        like,
        None,
        window["stride"],
        window["padding"],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )[1]


def race_layer(
    layer: Layer, batch: int, device: str, rounds: int
) -> tuple[dict[str, Timing], int]:
    """Verify and time one shape; also return the peak memory of our call."""
    input, grad, weight = layer.operands(batch, device)
    truth = true_moments(layer, input, grad, weight)
    moments = torch.zeros(2, *weight, device=device)

    def ours() -> Tensor:
        ops.grad_moments(input, grad, moments[0], moments[1], **layer.options())
        return moments

    def check(name: str, result: Any) -> None:
        parts = (
            zip(result, truth, strict=True) if name == OURS else [(result, truth[0])]
        )
        for got, expected in parts:
            verify(f"{name}, {layer}", got, expected, tolerance=1e-5)

    calls = {OURS: ours, TORCH: weight_gradient(layer, input, grad, weight)}
    times = race(calls, check, device=device, rounds=rounds, warmup=2)
    return times, peak_extra_bytes(ours, device)


def rows_of(
    model: str, batch: int, device: str, rounds: int, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """Return one row per shape and a total per image."""
    rows, all_times = [], []
    for layer in MODELS[model]:
        times, memory = race_layer(layer, batch, device, rounds)
        all_times.append((layer.count, times))
        gflops = layer.flops(batch) / times[OURS].median / 1e6
        rows.append(
            {"model": model, "batch": batch, "layer": str(layer), "count": layer.count}
            | times[OURS].row()
            | {"GFLOP/s": gflops, "of sgemm": gflops / limits["sgemm_gflops"]}
            | {f"torch {q}": time for q, time in quartiles(times[TORCH]).items()}
            | {"ratio": times[OURS].median / times[TORCH].median}
            | {"peak MB": memory / 1e6}
        )
    total = {name: total_per_image(all_times, name, batch) for name in (OURS, TORCH)}
    flops = sum(layer.flops(1) * layer.count for layer in MODELS[model])
    gflops = flops / total[OURS].median / 1e6
    rows.append(
        {"model": model, "batch": batch, "layer": "total per image"}
        | total[OURS].row()
        | {"GFLOP/s": gflops, "of sgemm": gflops / limits["sgemm_gflops"]}
        | {f"torch {q}": time for q, time in quartiles(total[TORCH]).items()}
        | {"ratio": total[OURS].median / total[TORCH].median}
    )
    return rows


def quartiles(times: Timing) -> dict[str, float]:
    """Return the middle and the quartiles, without the number of rounds."""
    return {q: ms for q, ms in times.row().items() if q != "rounds"}


def total_per_image(
    layers: Sequence[tuple[int, dict[str, Timing]]], name: str, batch: int
) -> Timing:
    """Return, round by round, the time of all layers; each counts as often as given."""
    rounds = zip(*(times[name].samples for _, times in layers), strict=True)
    counts = [count for count, _ in layers]
    return Timing(
        tuple(
            sum(n * ms for n, ms in zip(counts, samples, strict=True)) / batch
            for samples in rounds
        )
    )


def plot(rows: Sequence[dict], path: Path) -> None:
    """Draw GFLOP/s of every layer shape, model by model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = plt.subplots(
        1,
        len(models),
        figsize=(5.5 * len(models), 5),
        layout="constrained",
        squeeze=False,
    )
    for axis, model in zip(axes[0], models, strict=True):
        chosen = [r for r in rows if r["model"] == model and "of sgemm" in r]
        drawn = axis.barh(
            [f"{r['layer']}, {r['batch']}" for r in chosen],
            [r["GFLOP/s"] for r in chosen],
        )
        axis.bar_label(drawn, fmt="%.0f", padding=2)
        axis.set(title=model, xlabel="GFLOP/s")
        axis.margins(x=0.12)
        axis.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@program("benchmarks.moments")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its result file."""
    parser = arguments("moments", (__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--batch", type=at_least_one, nargs="+", help="default 32, VGG19 16"
    )
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    args = parser.parse_args(argv)
    limits = ceilings(args.device)
    rows = []
    for model in args.model:
        for batch in args.batch or [16 if model == "VGG19" else 32]:
            rows += rows_of(model, batch, args.device, args.rounds, limits)
    path = finish("moments", rows, limits, args.device, args.output)
    if args.plot:
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
