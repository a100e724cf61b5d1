"""``python -m benchmarks.gpu.cases``: cases of the ops, to run under other programs.

Without an option, small ones of both ops, for compute-sanitizer: those of the tests,
chosen so that kernels of every kind run and each run takes seconds; results are
compared with the PyTorch reference. With ``--largest``, grad_moments on the largest
layers of the networks, for ncu.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu import wgmma
from benchmarks.gpu.kernels import largest_layers, verified
from benchmarks.gpu.measure import TF32_KERNEL, NotHere, precision
from benchmarks.harness import verify
from benchmarks.record import ROOT, at_least_one, program, usable_device
from fisherprune import ops
from fisherprune.commandline import Parser
from fisherprune.ops import reference

sys.path.insert(0, str(ROOT / "tests" / "support"))

import dense_cases  # noqa: E402
import lanes_cases  # noqa: E402
import moment_cases  # noqa: E402
import taps_cases  # noqa: E402
import topk_cases  # noqa: E402
import window_cases  # noqa: E402

MOMENTS = (
    "plain_3x3",
    "first_layer",
    "many_outputs",
    "everything_uneven",
    "pointwise_stride_2",
    "depthwise_stride_2",
    "grouped_wide",
    "group_remainder",
    "few_positions",
    "group_beyond_all",
    "large_group",
    "many_samples",
    "zero_samples",
    "linear_wide",
    "linear_positions_2d",
    "linear_large",
)
WINDOWS = (
    "2_wide",
    "2_wide_group_remainder",
    "4_wide",
    "8_wide",
    "64_wide",
    "stride_2_in_window",
    "wide_padding_in_window",
    "grouped_in_window",
    "many_samples_in_window",
)
TAPS = (
    "4_wide_group_remainder",
    "8_wide_flushed_twice",
    "16_wide_ten_stages",
    "32_wide_two_bands",
    "grouped_by_taps",
)
WARPGROUPS = ("odd_channels", "odd_group_remainder", "four_blocks_share_longer")
LANES = (
    "7_lanes",
    "14_lanes",
    "two_bands_of_lanes",
    "group_remainder_of_lanes",
    "grouped_uneven_lanes",
)  # of planes, and channels_last
PIXELS = ("7_pixels_of_14", "uneven_vectors")
PLANES = ("7_planes_of_14", "uneven_planes")
DENSE = ("16_positions", "197_positions", "group_remainder_of_positions")
POINTWISE = ("7_pointwise", "14_pointwise", "uneven_pointwise_of_every_second")
STORED = ("plain_3x3", "8_wide")  # in every layout, and in bfloat16
TOPK = ("gaussian", "all_equal", "few_distinct", "signed_zeros")
COUNTS = (37, 20_000)  # scores
PRECISIONS = {"ieee": 1e-5, "tf32": TF32_KERNEL}


def check_moments(name: str, case: tuple, setting: str, device: str) -> None:
    """Run one case of grad_moments, as ``moment_cases.make`` returns it.

    Raises:
        WrongResult: where it differs from the float64 reference.
    """
    input, grad, weight, options = case
    start = moment_cases.accumulators(weight)
    found = [a.to(device) for a in start]
    truth = [a.double() for a in start]
    with precision(setting):
        ops.grad_moments(input.to(device), grad.to(device), *found, **options)
    reference.grad_moments(input.cpu(), grad.cpu(), *truth, **options)
    verify(name, [f.cpu() for f in found], truth, tolerance=PRECISIONS[setting])


def moments_on(device: str) -> Iterator[tuple[str, tuple]]:
    """Yield named cases of grad_moments, those stored in unusual ways on ``device``."""
    shapes = {**moment_cases.CASES, **window_cases.CASES}
    for name in (*MOMENTS, *WINDOWS):
        yield name, moment_cases.make(**shapes[name])
    for name in TAPS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = moment_cases.make(**taps_cases.CASES[name], dtype=dtype)
            yield f"{name} of nine taps, {dtype}", case
    channels_last = moment_cases.LAYOUTS["channels_last"]
    for name in PLANES:
        yield name, moment_cases.make(**lanes_cases.PLANES[name])
    for name in (*LANES, *PIXELS):
        shape = {**lanes_cases.CASES, **lanes_cases.PIXELS}[name]
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            *pair, weight, options = moment_cases.make(**shape, dtype=dtype)
            stored = *map(channels_last, pair), weight, options
            if name in LANES or dtype != torch.float32:  # those of PIXELS are copied
                yield f"{name} {dtype}", (*pair, weight, options)
            yield f"{name} {dtype} channels_last", stored
    for name in DENSE:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = moment_cases.make(**dense_cases.CASES[name], dtype=dtype)
            yield f"{name} {dtype}", case
    for name in POINTWISE:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            shape = dense_cases.POINTWISE[name]
            *pair, weight, options = moment_cases.make(**shape, dtype=dtype)
            yield f"{name} {dtype}", (*pair, weight, options)
            stored = *map(channels_last, pair), weight, options
            yield f"{name} {dtype} channels_last", stored
    for name in STORED:
        input, grad, *rest = moment_cases.make(**shapes[name])
        pair = input.to(device), grad.to(device)
        yield f"{name} bfloat16", (*(x.bfloat16() for x in pair), *rest)
        for layout, store in moment_cases.LAYOUTS.items():
            yield f"{name} {layout}", (*map(store, pair), *rest)
    yield "expanded", moment_cases.expanded(device)
    for case in moment_cases.vectors_that_end_within_a_row(device):
        yield f"{case[0].shape[-1]} positions", case


def check_warpgroups(device: str) -> None:
    """Run the kernel of products of warpgroups, where it can run.

    Raises:
        WrongResult: where a result differs from the reference.
    """
    try:
        wgmma.require(device)
    except NotHere as reason:
        print(f"products of warpgroups: not run: {reason}")
        return
    with wgmma.switched("1"):
        for name in WARPGROUPS:
            case = moment_cases.make(**taps_cases.WARPGROUPS[name])
            check_moments(f"{name} by warpgroups", case, "tf32", device)


def check_topk(name: str, count: int, device: str) -> None:
    """Run one case of global_topk, and the steps that it shares over devices.

    Raises:
        WrongResult: where a mask, threshold or count differs from the reference.
    """
    arrays, keep = topk_cases.case(name, count)
    scores = [torch.from_numpy(a) for a in arrays]
    placed = [s.to(device) for s in scores]
    masks, thresholds = ops.global_topk(placed, keep)
    expected = reference.global_topk(scores, keep)
    verify(name, [[m.cpu() for m in each] for each in masks], expected[0])
    verify(f"{name}, thresholds", thresholds.cpu(), expected[1])
    _, thresholds = ops.global_topk(placed, keep[:1], ranks=keep[1:])
    verify(f"{name}, ranks", thresholds.cpu(), expected[1])
    histogram = ops.topk_histogram(placed, 0, 0, 11).cpu()
    verify(f"{name}, counts", histogram, reference.topk_histogram(scores, 0, 0, 11))
    ties = [1] * len(scores)
    steps = [m.cpu() for m in ops.topk_masks(placed, 0.5, ties)]
    verify(f"{name}, masks", steps, list(reference.topk_masks(scores, 0.5, ties)))


@program("benchmarks.gpu.cases")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen cases."""
    parser = Parser("python -m benchmarks.gpu.cases", description=__doc__)
    parser.add_argument("--device", type=usable_device, default="cuda")
    parser.add_argument("--largest", action="store_true", help="for ncu")
    parser.add_argument("--batch", type=at_least_one, default=512, help="of --largest")
    options = parser.parse_args(argv)
    if options.largest:
        run_largest(options.device, options.batch)
    else:
        run_small(options.device)


def run_largest(device: str, batch: int) -> None:
    """Run grad_moments once on each of the layers that the step ``kernel`` times."""
    layers = largest_layers()
    for layer in layers:
        with precision("tf32"):
            verified(layer, batch, device)
    print(f"{len(layers)} layers, batch {batch}: right")


def run_small(device: str) -> None:
    """Run the small cases of both ops."""
    moments = list(moments_on(device))
    for name, case in moments:
        for setting in PRECISIONS:
            check_moments(name, case, setting, device)
    check_warpgroups(device)
    for name in TOPK:
        for count in COUNTS:
            check_topk(name, count, device)
    print(f"{len(moments)} cases of grad_moments, {len(TOPK)} of global_topk: right")


if __name__ == "__main__":
    sys.exit(main())
