"""Layers without taps, and copies of 16 bits, in the CUDA kernels run on the CPU."""

import dense_cases
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

HALVES = torch.float16, torch.bfloat16
DENSE = {"tile": "dense", "allow_tf32": True}

each_half = pytest.mark.parametrize("dtype", HALVES)
each_layout = pytest.mark.parametrize("layout", ["planes", "channels_last"])


def made(shape, layout="planes", dtype=torch.float32, **options):
    """Make a case without more bits than a TF32 has."""
    *pair, weight, arguments = make(**shape)
    pair = [as_tf32(x).to(dtype) for x in pair]
    if layout in LAYOUTS:
        pair = map(LAYOUTS[layout], pair)
    return *pair, weight, arguments | options


def suits(shape, layout, dtype) -> bool:
    """Return whether 4 bytes of positions, or 16 of channels, end where rows do."""
    if layout == "channels_last":
        vector, groups = 16 // dtype.itemsize, shape.get("groups", 1)
        return all(shape[sides] // groups % vector == 0 for sides in "co")
    height, width = shape["size"]
    along = shape.get("stride", (1, 1))[width > 1]
    even = width % 2 == 0 or ("stride" not in shape and height * width % 2 == 0)
    return dtype == torch.float32 or (along == 1 and even)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@each_layout
def test_layers_without_taps(layout, dtype, tmp_path):
    """In 16 bits in float32 precision, too."""
    named = [
        (f"{name} {tf32}", made(shape, layout, dtype, tile="dense", allow_tf32=tf32))
        for name, shape in dense_cases.POINTWISE.items()
        for tf32 in ((True,) if dtype == torch.float32 else (True, False))
        if suits(shape, layout, dtype)
    ]
    assert len(named) >= 8
    check_all(named, tmp_path)


@each_layout
def test_operands_are_rounded_to_tf32(layout, tmp_path):
    """To the bit as if they had been rounded before."""
    for name in ("7_pointwise", "14_pointwise", "uneven_pointwise_of_every_second"):
        shape = dense_cases.POINTWISE[name]
        *rounded, weight, options = made(shape, layout, **DENSE)
        raw = make(**shape)[:2]
        if layout in LAYOUTS:
            raw = map(LAYOUTS[layout], raw)
        both = [(*pair, weight, dict(options)) for pair in (raw, rounded)]
        (found, _), (expected, _) = moments(both, tmp_path)
        assert all(map(torch.equal, found, expected)), name


def within_larger(x, before):
    """Return the tensor as a view, with NaN around each row, channel and sample."""
    n, c, h, w = x.shape
    shape = n, c + 8, h + 2, w + before + 8
    wide = torch.full(shape, torch.nan, dtype=x.dtype)
    view = wide[:, 8:, 1:-1, before:-8]
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [6, 8])
def test_planes_that_begin_anywhere(width, stride, dtype, tmp_path):
    """In one row without gaps, too, which ends within 16 bytes."""
    shape = dict(n=3, c=16, o=24, size=(7, width), stride=(stride, stride))
    input, grad, weight, options = made(shape, dtype=dtype, allow_tf32=True)
    apart = [within_larger(x, 2) for x in (input, grad)]
    rows = torch.full((3, 40, 1, 64), torch.nan, dtype=dtype)
    rows[:, :16, 0, : 7 * width] = input.flatten(2)
    rows[:, 16:, 0, : grad[0, 0].numel()] = grad.flatten(2)
    one_row = rows[:, 16:, :, : grad[0, 0].numel()].view(grad.shape)
    images = rows[:, :16, :, : 7 * width].view(input.shape)
    named = [
        ("further apart", (*apart, weight, dict(options))),
        ("rows of vectors", (images, one_row, weight, dict(options))),
        ("unaligned", (input, grad, weight, options | {"shift": 4})),
        ("at any place", (input, grad, weight, options | {"shift": dtype.itemsize})),
    ]
    check_all(named, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_pixels_that_begin_anywhere(dtype, tmp_path):
    shape = dict(n=3, c=16, o=24, size=(9, 7), stride=(2, 2))
    input, grad, weight, options = made(shape, "channels_last", dtype, **DENSE)
    apart = [
        within_larger(x.permute(0, 2, 3, 1), 8).permute(0, 3, 1, 2)
        for x in (input, grad)
    ]
    check_all([("", (*apart, weight, options))], tmp_path)


# ---- copies of 16 bits ----


@each_half
@pytest.mark.parametrize("tf32", [True, False])
def test_copies_of_layers_without_taps(tf32, dtype, tmp_path):
    named = [
        (name, made(shape, "planes", dtype, tile="dense", copies=True, allow_tf32=tf32))
        for name, shape in dense_cases.POINTWISE.items()
        if suits(shape, "channels_last", dtype)
    ]
    assert len(named) >= 10
    check_all(named, tmp_path)


@each_half
def test_copies_of_images(dtype, tmp_path):
    shapes = lanes_cases.CASES | lanes_cases.PLANES | lanes_cases.PIXELS
    options = {"tile": "slim_lanes", "copies": True, "allow_tf32": True}
    named = [
        (name, made(shape, "planes", dtype, **options))
        for name, shape in shapes.items()
        if suits(shape, "channels_last", dtype) and shape["size"][1] < 40
    ]
    assert len(named) >= 15
    check_all(named, tmp_path)


@each_half
def test_copies_of_more_channels_than_a_block_has(dtype, tmp_path):
    """And of more positions, of one value further than 16 bytes."""
    shape = dict(n=2, c=72, o=136, size=(3, 61), kernel=(3, 3), padding=(1, 1))
    options = {"tile": "lanes", "copies": True, "allow_tf32": True}
    input, grad, *rest = made(shape, dtype=dtype, **options)
    apart = [within_larger(x, 3) for x in (input, grad)]
    named = [("", (input, grad, *rest)), ("further apart", (*apart, *rest))]
    check_all([(name, (*c[:3], dict(c[3]))) for name, c in named], tmp_path)


@each_half
def test_copies_are_the_plan_of_odd_rows(dtype, tmp_path):
    """The bits tell: they are those of channels_last operands."""
    for shape in (
        dict(size=(7, 7), kernel=(3, 3), padding=(1, 1)),
        dict(size=(14, 14), kernel=(3, 3), padding=(1, 1), stride=(2, 2)),
        dict(size=(14, 14), stride=(2, 2)),
        dict(size=(7, 7)),
    ):
        shape = dict(n=3, c=128, o=128) | shape
        cases = [
            made(shape, layout, dtype, allow_tf32=True)
            for layout in ("planes", "channels_last")
        ]
        (planned, truth), (expected, _) = moments(cases, tmp_path)
        assert all(map(torch.equal, planned, expected)), shape
        assert max(distances(planned, truth)) <= 1e-5, shape


# ---- plans ----

F16 = {"dtype": torch.float16}


@pytest.mark.parametrize(
    ("shape", "how", "tile", "copies"),
    [
        # Of ResNet50 on images of 224 x 224.
        ((256, 256, 64, 56), {"kernel": 1}, "dense", False),
        ((256, 256, 64, 56), {"kernel": 1} | F16, "dense", False),
        ((256, 512, 2048, 7), {"kernel": 1}, "dense", False),
        ((256, 512, 2048, 7), {"kernel": 1} | F16, "dense", True),
        ((256, 1024, 2048, 14), {"kernel": 1, "stride": 2}, "dense", False),
        ((256, 1024, 2048, 14), {"kernel": 1, "stride": 2} | F16, "dense", True),
        ((256, 128, 128, 56), {"stride": 2} | F16, "lanes", True),
        ((256, 512, 512, 14), {"stride": 2} | F16, "lanes", True),
        ((256, 512, 512, 7), F16, "lanes", True),
        ((256, 512, 512, 14), F16, "lanes", False),
        # Of ResNet18 on those of 32 x 32.
        ((512, 256, 512, 8), {"kernel": 1, "stride": 2}, "dense", False),
        ((512, 256, 512, 8), {"kernel": 1, "stride": 2} | F16, "dense", True),
        # Copying would take longer than what it saves.
        ((256, 64, 128, 56), {"kernel": 1, "stride": 2} | F16, "square", False),
        # No vectors of channels.
        ((256, 500, 2048, 7), {"kernel": 1} | F16, "tall", False),
    ],
)
def test_plan(shape, how, tile, copies, tmp_path):
    (answer,) = drive.run([drive.plan_case(*shape, **how)], tmp_path)
    words = np.frombuffer(answer, np.int64)
    assert (drive.TILES[words[3]], bool(words[4])) == (tile, copies)


def test_workspace_has_the_copies(tmp_path):
    n, channels, outputs = 256, 1024, 2048
    asked = drive.plan_case(n, channels, outputs, 14, kernel=1, stride=2, **F16)
    (answer,) = drive.run([asked], tmp_path)
    splits, parts, workspace = np.frombuffer(answer, np.int64)[:3].tolist()
    sums = splits if parts > 1 else 2 * splits if splits > 1 else 0
    copies = 2 * 49 * n * (channels + outputs)  # bytes; of every second row and column
    assert workspace == copies + 4 * sums * channels * outputs


@pytest.mark.parametrize(
    ("layers", "kind", "how", "cycles"),
    [
        ("POINTWISE", "dense", (torch.float32, False), [1212, 1029, 1024, 1212]),
        ("POINTWISE", "dense", (torch.float32, True), [1212, 1029, 1024, 1212]),
        ("POINTWISE", "dense", (torch.bfloat16, True), [669, 520, 512, 669]),
        ("STRIDED", "lanes", (torch.bfloat16, True), [820, 834, 934]),
    ],
)
def test_cycles_of_shared_memory(layers, kind, how, cycles, tmp_path):
    """It bounds these kernels: see what tensor cores take in shared_cycles.py."""
    counted = shared_cycles.counts_of_layers(
        getattr(shared_cycles, layers), tmp_path, kind, *how
    )
    assert [round(n) for n, _ in counted] == cycles
