"""The CUDA kernel whose lanes find their positions, run on the CPU; and its plans."""

import lanes_cases
import numpy as np
import pytest
import shared_cycles
import torch
from emulated import as_tf32, check_all, distances, moments
from emulator import drive
from moment_cases import LAYOUTS, make

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++, x86-64"
)

SHAPES = {
    "planes": lanes_cases.CASES | lanes_cases.PLANES,
    "channels_last": lanes_cases.CASES | lanes_cases.PIXELS,
}
DTYPES = torch.float32, torch.float16, torch.bfloat16
SLIM = {"allow_tf32": True, "tile": "slim_lanes"}
TOO_WIDE = ("bands_of_words",)  # for the slim tile

each_layout = pytest.mark.parametrize("layout", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def suits(shape, layout, dtype) -> bool:
    """Return whether 4 bytes, or 16 of channels, end where rows and groups do."""
    if layout == "planes":
        even = shape["size"][1] % 2 == 0 and "stride" not in shape
        return dtype == torch.float32 or even
    groups, vector = shape.get("groups", 1), 16 // dtype.itemsize
    return all(shape[sides] // groups % vector == 0 for sides in "co")


def stored(x, layout, dtype):
    """Return it without more bits than a TF32 has."""
    x = as_tf32(x).to(dtype)
    return LAYOUTS[layout](x) if layout in LAYOUTS else x


def made(shape, layout, dtype, **options):
    *pair, weight, arguments = make(**shape)
    pair = [stored(x, layout, dtype) for x in pair]
    return *pair, weight, arguments | SLIM | options


@each_dtype
@each_layout
@pytest.mark.parametrize("tile", ["lanes", "slim_lanes"])
def test_sums_by_lanes(tile, layout, dtype, tmp_path):
    named = [
        (name, made(shape, layout, dtype, tile=tile))
        for name, shape in SHAPES[layout].items()
        if suits(shape, layout, dtype)
        and not (tile == "slim_lanes" and name in TOO_WIDE)
    ]
    assert len(named) > 10
    check_all(named, tmp_path)


@each_layout
def test_operands_are_rounded_to_tf32(layout, tmp_path):
    """To the bit as if they had been rounded before."""
    for name in ("7_lanes", "28_lanes", "two_bands_of_lanes"):
        *rounded, weight, options = made(lanes_cases.CASES[name], layout, torch.float32)
        raw = make(**lanes_cases.CASES[name])[:2]
        if layout in LAYOUTS:
            raw = map(LAYOUTS[layout], raw)
        both = [(*pair, weight, dict(options)) for pair in (raw, rounded)]
        (found, _), (expected, _) = moments(both, tmp_path)
        assert all(map(torch.equal, found, expected)), name


@each_dtype
@each_layout
def test_groups_shared_by_blocks_of_lanes(layout, dtype, tmp_path):
    """Parts of groups, empty ones too; and whole groups for each block."""
    named = []
    for n, group_size, size in [
        (9, 9, (7, 6)),
        (7, 90, (5, 4)),
        (6, 3, (14, 14)),
        (9, 1, (9, 10)),
    ]:
        shape = dict(n=n, c=16, o=64, size=size, kernel=(3, 3), padding=(1, 1))
        options = {"group_size": group_size, "multiprocessors": 13}
        case = made(shape, layout, dtype, **options)
        named.append((f"{n} samples, groups of {group_size}", case))
    check_all(named, tmp_path)


@each_dtype
@pytest.mark.parametrize("width", [6, 14, 28])
def test_planes_that_begin_anywhere(width, dtype, tmp_path):
    """Samples, channels and rows of images further apart than they are long."""
    shape = dict(n=3, c=16, o=64, size=(5, width), kernel=(3, 3), padding=(1, 1))
    input, grad, weight, options = made(shape, "planes", dtype)
    wide = torch.full((3, 17, 6, width + 2), torch.nan, dtype=dtype)
    wide[:, 1:, 1:, 2:] = input
    further = torch.full((3, 65, 5, width), torch.nan, dtype=dtype)
    further[:, 1:] = grad
    apart = wide[:, 1:, 1:, 2:], further[:, 1:]
    named = [
        ("further apart", (*apart, weight, dict(options))),
        ("unaligned", (input, grad, weight, options | {"shift": 4})),
    ]
    check_all(named, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_planes_of_16_bits_at_odd_places(dtype, tmp_path):
    """They do not suit the kernel, which copies two values at once."""
    shape = dict(n=3, c=16, o=64, size=(5, 14), kernel=(3, 3), padding=(1, 1))
    input, grad, weight, options = made(shape, "planes", dtype)
    del options["tile"]
    wide = torch.zeros(3, 16, 5, 15, dtype=dtype)
    wide[..., 1:] = input
    further = torch.zeros(3, 64 * 70 + 1, dtype=dtype)
    further[:, 1:] = grad.flatten(1)
    odd = further[:, 1:].view(grad.shape)
    named = [
        ("rows", (wide[..., 1:], grad, weight, dict(options))),
        ("samples", (input, odd, weight, dict(options))),
        ("all", (input, grad, weight, options | {"shift": 2})),
    ]
    check_all(named, tmp_path)


@each_dtype
def test_pixels_within_larger_images(dtype, tmp_path):
    """Channels between others, and so pixels further apart than they have channels.

    Rows of images may have others in between, too.
    """
    shape = dict(n=3, c=16, o=64, size=(6, 7), kernel=(3, 3), padding=(1, 1))
    *pair, weight, options = made(shape, "channels_last", dtype)
    wider = [
        torch.full((3, 6, 7, x.shape[1] + 16), torch.nan, dtype=dtype) for x in pair
    ]
    wider[0] = torch.full((3, 6, 9, 32), torch.nan, dtype=dtype)[:, :, 1:-1]
    for x, wide in zip(pair, wider, strict=True):
        wide[..., 8:-8] = x.permute(0, 2, 3, 1)
    views = [wide[..., 8:-8].permute(0, 3, 1, 2) for wide in wider]
    check_all([("", (*views, weight, options))], tmp_path)


@each_dtype
@each_layout
def test_infinities_stay_with_the_taps_that_see_them(layout, dtype, tmp_path):
    """What lies behind a sample's last position is multiplied by zeros, too."""
    shape = dict(n=3, c=16, o=64, size=(7, 6), kernel=(3, 3), padding=(1, 1))
    case = made(shape, layout, dtype)
    case[0][0, :, 0, 0] = case[0][0, :, 6, 5] = torch.inf
    [(results, truths)] = moments([case], tmp_path)
    for result, truth in zip(results, truths, strict=True):
        finite = truth.isfinite()
        assert 0 < finite.sum() < finite.numel()
        assert torch.equal(result.isfinite(), finite)
        assert distances([result[finite]], [truth[finite]])[0] <= 1e-5


# ---- plans ----


@pytest.mark.parametrize(
    ("shape", "how", "tile"),
    [
        ((256, 64, 64, 56), {}, "slim_lanes"),
        ((256, 128, 128, 28), {}, "lanes"),
        ((256, 256, 256, 14), {}, "lanes"),
        ((256, 512, 512, 7), {}, "lanes"),
        ((256, 256, 256, 8), {}, "taps"),
        ((256, 3, 64, 28), {}, "small"),  # most of a tile would be empty
        ((256, 64, 128, 56), {"stride": 2}, "lanes"),
        ((256, 64, 128, 32), {"stride": 2}, "window"),
        ((256, 64, 128, 56), {"stride": 2, "dtype": torch.bfloat16}, "lanes"),
        ((256, 64, 128, 56), {"stride": 2, "channels_last": True}, "lanes"),
        ((256, 64, 64, 32), {"channels_last": True}, "slim_lanes"),
        ((256, 512, 512, 7), {"channels_last": True}, "lanes"),
        ((256, 510, 512, 7), {"channels_last": True}, "tall"),  # no vectors
        ((256, 512, 2048, 7), {"channels_last": True, "kernel": 1}, "dense"),
    ],
)
def test_plan_takes_the_tile_of_lanes(shape, how, tile, tmp_path):
    (answer,) = drive.run([drive.plan_case(*shape, **how)], tmp_path)
    assert drive.TILES[np.frombuffer(answer, np.int64)[3]] == tile


@pytest.mark.parametrize(
    ("layers", "how", "cycles"),
    [
        ("LARGE_LAYERS", (torch.float32, False), [911, 886, 917, 1031]),
        ("LARGE_LAYERS", (torch.float32, True), [966, 893, 917, 1030]),
        ("LAYERS", (torch.float32, True), [933, 885, 889, 1010]),
        ("LARGE_LAYERS", (torch.bfloat16, True), [491, 474, 513, 612]),
    ],
)
def test_cycles_of_shared_memory(layers, how, cycles, tmp_path):
    """It bounds these kernels: see what tensor cores take in shared_cycles.py."""
    counted = shared_cycles.counts_of_layers(
        getattr(shared_cycles, layers), tmp_path, "lanes", *how
    )
    assert [round(n) for n, _ in counted] == cycles
