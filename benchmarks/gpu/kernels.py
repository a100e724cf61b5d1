"""The two ops alone on a GPU, as share of what the device can do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import moments, topk
from benchmarks.gpu.measure import (
    TF32_KERNEL,
    Goal,
    NotHere,
    Row,
    device_times,
    matmul_rates,
    precision,
    ratios,
    row,
)
from benchmarks.harness import ceilings, race, verify
from fisherprune import ops
from fisherprune.masks.counts import keep_count

READS = 4  # of every score in one selection: three histograms and the masks
# Positions of a layer from which on its rate can be held to that of a matrix product.
# An output's gradient and its square are added once a sample, one FADD and one FFMA:
# two of the 128 of a clock and multiprocessor, the time of 16 of its 1024 TF32 products
# and additions. At 2 x 2 positions, with four of these, that alone allows a quarter of
# the peak, or about 0.3 of what a matrix product reaches of it.
JUDGED_POSITIONS = 16
LARGE_IMAGES = [
    moments.Layer(64, 64, 56),
    moments.Layer(128, 128, 28),
    moments.Layer(256, 256, 14),
    moments.Layer(512, 512, 7),
    moments.Layer(512, 2048, 7, kernel=1),
    moments.Layer(1024, 2048, 14, kernel=1, stride=2),
]
"""Layers of ResNet18, and two of ResNet50, on images of 224 x 224."""
SPREAD = 0x9E3779B1  # odd, so that i * SPREAD mod 2^m visits every number once


def largest_layers() -> list[moments.Layer]:
    """Return the shapes of ResNet18 and VGG19 with most arithmetic, or most weights."""
    layers = {str(la): la for model in moments.MODELS.values() for la in model}.values()
    most = max(layer.flops(1) for layer in layers)
    weights = max(layer.channels * layer.outputs for layer in layers)
    return [
        layer
        for layer in layers
        if layer.flops(1) == most or layer.channels * layer.outputs == weights
    ]


def kernel(
    device: str,
    batch: int = 512,
    layers: Sequence[moments.Layer] | None = None,
    n: int = 8192,
    rounds: int = 20,
    channels_last: bool = False,
) -> Iterator[Row]:
    """Time grad_moments alone, as share of the TF32 matmul rate measured here."""
    peak = matmul_rates(device, n)["tf32_matmul_tflops"]
    for layer in layers or largest_layers():
        with precision("tf32"):
            call = verified(layer, batch, device, channels_last)
            times = device_times(call, device, rounds)
        rates = [layer.flops(batch) / us / 1e6 for us in times]
        goal = Goal(0.35, at_most=False, aim=0.6)
        form = ", channels_last" if channels_last else ""
        yield row(
            f"grad_moments, {layer}{form}, batch {batch}: share of TF32 matmul",
            "of matmul",
            [rate / peak for rate in rates],
            goal if layer.positions >= JUDGED_POSITIONS else None,
            microseconds=statistics.median(times),
            tflops=statistics.median(rates),
            matmul_tflops=peak,
        )


def large_images(
    device: str,
    batch: int = 64,
    layers: Sequence[moments.Layer] = LARGE_IMAGES,
    n: int = 8192,
    rounds: int = 20,
) -> Iterator[Row]:
    """Do the same with layers of large images, contiguous and channels_last."""
    for channels_last in (False, True):
        yield from kernel(device, batch, layers, n, rounds, channels_last)


def verified(
    layer: moments.Layer, batch: int, device: str, channels_last: bool = False
) -> Callable[[], None]:
    """Return a call of grad_moments on a layer, after its result was found right.

    Raises:
        WrongResult: where it is not.
    """
    input, grad, weight = layer.operands(batch, device)
    if channels_last:
        form = torch.channels_last
        input, grad = (x.contiguous(memory_format=form) for x in (input, grad))
    sum, sum_sq = torch.zeros(2, *weight, device=device)

    def call() -> None:
        ops.grad_moments(input, grad, sum, sum_sq, **layer.options())

    call()
    truth = moments.true_moments(layer, input, grad, weight)
    verify(f"sum, {layer}", sum, truth[0], tolerance=TF32_KERNEL)
    verify(f"sum_sq, {layer}", sum_sq, truth[1], tolerance=TF32_KERNEL)
    return call


def sequences(
    device: str,
    batch: int = 64,
    positions: int = 197,
    features: tuple[int, int] = (768, 3072),
    n: int = 8192,
    rounds: int = 20,
) -> Iterator[Row]:
    """Time grad_moments of a vision transformer's linear layer in bfloat16."""
    peak = matmul_rates(device, n)["bf16_matmul_tflops"]
    layer, weight = moments.Layer(*features, size=0), torch.Size(features[::-1])
    input, grad = (
        torch.randn(batch, positions, f, device=device, dtype=torch.bfloat16)
        for f in features
    )
    truth = moments.true_moments(layer, input, grad, weight)
    for setting in ("ieee", "tf32"):
        sums = torch.zeros(2, *weight, device=device)
        call = partial(ops.grad_moments, input, grad, *sums)
        with precision(setting):
            call()
            verify(f"moments in bfloat16, {setting}", sums, truth, tolerance=1e-5)
            times = device_times(call, device, rounds)
        rates = [positions * layer.flops(batch) / us / 1e6 for us in times]
        yield row(
            f"grad_moments, {layer}, {positions} positions in bfloat16, batch {batch}, "
            f"{setting}: share of bfloat16 matmul",
            "of matmul",
            [rate / peak for rate in rates],
            microseconds=statistics.median(times),
            tflops=statistics.median(rates),
            matmul_tflops=peak,
        )


def selection(device: str, total: int | None = None, rounds: int = 50) -> Iterator[Row]:
    """Time selections of ResNet18's scores, from the scores to bool masks."""
    scores = topk.make_scores(total, device)
    count = sum(s.numel() for s in scores)
    place, goal = f"{count:,} scores", Goal(150, aim=60)
    yield device_row(f"{place}: global_topk, device time", scores, rounds, goal)
    five = f"{place}: global_topk, five sparsities, device time"
    yield device_row(five, scores, rounds, sparsities=topk.SPARSITIES)
    yield from tied_rows(place, [s.shape for s in scores], device, rounds)
    yield from wall_rows(place, scores, device, rounds, goal)


def device_row(
    name: str,
    scores: list[Tensor],
    rounds: int,
    goal: Goal | None = None,
    sparsities: Sequence[float] = (0.9,),
) -> Row:
    """Time the op on scores whose order is known."""
    keep = [keep_count(sum(s.numel() for s in scores), s) for s in sparsities]
    call = partial(torch.ops.fisherprune.global_topk, scores, keep)
    found = call()[0]
    masks = [found[i : i + len(scores)] for i in range(0, len(found), len(scores))]
    topk.checker(scores, keep)("global_topk", masks)
    return row(name, "us", device_times(call, str(scores[0].device), rounds), goal)


def first_cut(ordered: Tensor, least: int) -> int:
    """Return the smallest k from ``least`` on that keeps some of equal scores, not all.

    Args:
        ordered: all scores in falling order.
        least: from 1 on.

    Raises:
        ValueError: where there is none.
    """
    equal = (ordered[least - 1 : -1] == ordered[least:]).nonzero()
    if not len(equal):
        raise ValueError("first_cut: no two of the scores from there on are equal")
    return least + int(equal[0])


def tied_masks(scores: Sequence[Tensor], threshold: float, k: int) -> list[Tensor]:
    """Return the truth: what is above, and the first that are equal, k together."""
    flat = topk.flatten(scores)
    mask, equal = flat > threshold, (flat == threshold).nonzero()[:, 0]
    mask[equal[: k - int(mask.sum())]] = True
    return topk.split_like(mask, scores)


def tied_rows(
    place: str, shapes: Sequence[torch.Size], device: str, rounds: int
) -> Iterator[Row]:
    """Time normal scores at a threshold that several have and not all are kept of."""
    scores = [torch.randn(shape, device=device) for shape in shapes]
    ordered = topk.flatten(scores).sort(descending=True).values
    k = first_cut(ordered, keep_count(len(ordered), 0.9))
    threshold = ordered[k - 1].item()
    call = partial(torch.ops.fisherprune.global_topk, scores, [k])
    verify("global_topk", list(call()[0]), tied_masks(scores, threshold, k))
    times = device_times(call, device, rounds)
    equal = int((ordered == threshold).sum())
    name = f"{place}, normal, equal ones cut: global_topk, device time"
    yield row(name, "us", times, equal_to_threshold=equal)


def wall_rows(
    place: str, scores: list[Tensor], device: str, rounds: int, goal: Goal
) -> Iterator[Row]:
    """Time what a caller pays, beside the selection without this package."""
    k = keep_count(sum(s.numel() for s in scores), 0.9)
    peer = "cat + topk + masks"
    calls = {
        "select_masks": partial(topk.selected, scores, 0.9),
        peer: partial(topk.alone, topk.by_topk, scores, k),
    }
    check = topk.checker(scores, [k])
    times = race(calls, check, device=device, rounds=rounds, warmup=3)
    wall = {name: [ms * 1e3 for ms in t.samples] for name, t in times.items()}
    yield row(f"{place}: select_masks, wall clock", "us", wall["select_masks"], goal)
    yield row(f"{place}: {peer}, wall clock", "us", wall[peer])
    ratio = ratios(times[peer], times["select_masks"])
    least = Goal(5, at_most=False)
    yield row(f"{place}: {peer} over select_masks", "x", ratio, least)


def scattered_scores(total: int, device: str) -> list[Tensor]:
    """Return ``total``, a power of two, distinct scores in scattered order.

    As ``topk.make_scores``, whose random order takes minutes at this size: the entry at
    i has the rank i * SPREAD mod total, made on the device in parts. Each tensor begins
    at a multiple of 16 bytes, as one of its own would.
    """
    scores = torch.empty(total, dtype=torch.int32, device=device)
    for start in range(0, total, 1 << 24):
        part = scores[start : start + (1 << 24)]
        index = torch.arange(start, start + len(part), device=device)
        part.copy_((index * SPREAD & (total - 1)) + topk.LEAST_BITS)
    sizes = [max(4, s * total // sum(topk.SIZES) // 4 * 4) for s in topk.SIZES]
    sizes[-1] += total - sum(sizes)
    return list(scores.view(torch.float32).split(sizes))


def large_selection(
    device: str, total: int = 1 << 30, megabytes: int = 2048, rounds: int = 10
) -> Iterator[Row]:
    """Time a selection so large that memory alone counts, against a copy."""
    if torch.device(device).type == "cuda":
        free, needed = torch.cuda.mem_get_info(device)[0], 12 * total
        if free < needed:
            raise NotHere(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    copied = ceilings(device, megabytes=megabytes)["copy_gbs"]
    scores = scattered_scores(total, device)
    k = keep_count(total, 0.9)
    call = partial(torch.ops.fisherprune.global_topk, scores, [k])
    topk.checker(scores, [k])("global_topk", [list(call()[0])])
    times = device_times(call, device, rounds)
    rates = [READS * 4 * total / us / 1e3 for us in times]  # GB/s
    yield row(
        f"{total:,} scores: global_topk, share of copy bandwidth",
        "of copy",
        [rate / copied for rate in rates],
        Goal(0.6, at_most=False, aim=0.8),
        microseconds=statistics.median(times),
        copy_gbs=copied,
    )
