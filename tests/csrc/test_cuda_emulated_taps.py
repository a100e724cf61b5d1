"""The CUDA kernel of nine taps, run on the CPU, and the plans that take it."""

import numpy as np
import pytest
import shared_cycles
import taps_cases
import torch
from emulated import as_tf32, check_all, moments
from emulator import drive
from moment_cases import make

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++, x86-64"
)

SLIM = {"allow_tf32": True, "tile": "slim_taps"}


def cases(dtype=torch.float32):
    """Make each case for the tiles that it suits: 64 or 128 outputs."""
    for name, shape in taps_cases.CASES.items():
        *case, arguments = make(**shape, dtype=dtype)
        outputs = shape["o"] // shape.get("groups", 1)
        for tile in ("slim_taps", "taps")[: outputs // 64]:
            yield f"{name} {tile}", (*case, arguments | SLIM | {"tile": tile})


def test_sums_by_taps(tmp_path):
    named = []
    for name, (input, grad, *rest) in cases():
        named.append((name, (as_tf32(input), as_tf32(grad), *rest)))
    check_all(named, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_by_taps_of_16_bits(dtype, tmp_path):
    """Products are exact: nothing of the operands is rounded."""
    check_all(list(cases(dtype)), tmp_path)


def test_operands_are_rounded_to_tf32(tmp_path):
    """To the bit as if they had been rounded before."""
    for name in ("4_wide_group_remainder", "8_wide", "16_wide_short", "32_wide_short"):
        input, grad, weight, arguments = make(**taps_cases.CASES[name])
        given = (input, grad), (as_tf32(input), as_tf32(grad))
        both = [(*pair, weight, arguments | SLIM) for pair in given]
        (raw, _), (rounded, _) = moments(both, tmp_path)
        assert all(map(torch.equal, raw, rounded)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_shared_by_blocks_of_taps(dtype, tmp_path):
    """Parts of groups, empty ones too; and whole groups for each block."""
    named = []
    for n, group_size, size in [(9, 9, 8), (7, 90, 4), (6, 3, 16), (9, 1, 8)]:
        shape = dict(size=(size, size), kernel=(3, 3), padding=(1, 1), dtype=dtype)
        input, grad, weight, arguments = make(n=n, c=16, o=64, **shape)
        if dtype == torch.float32:
            input, grad = as_tf32(input), as_tf32(grad)
        arguments |= SLIM | {"group_size": group_size, "multiprocessors": 13}
        name = f"{n} samples, groups of {group_size}"
        named.append((name, (input, grad, weight, arguments)))
    check_all(named, tmp_path)


def test_images_within_larger_tensors(tmp_path):
    """Samples and channels may be further apart than their positions take."""
    *pair, weight, arguments = make(**taps_cases.CASES["8_wide_group_remainder"])
    wider = [torch.full((len(x), 2 * x.shape[1], 9, 8), torch.nan) for x in pair]
    for x, wide in zip(pair, wider, strict=True):
        wide[:, ::2, :8] = as_tf32(x)
    strided = [wide[:, ::2, :8] for wide in wider]
    check_all([("", (*strided, weight, arguments | SLIM))], tmp_path)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((512, 64, 64, 32), "slim_taps"),
        ((512, 128, 128, 16), "taps"),
        ((512, 512, 512, 4), "taps"),
        ((512, 64, 192, 8), "slim_taps"),  # no multiple of 128
        ((512, 60, 64, 8), "slim_lanes"),  # no multiple of 16 channels
        ((512, 64, 60, 8), "slim_lanes"),
        ((512, 64, 64, 28), "slim_lanes"),
    ],
)
def test_plan_takes_the_tile_of_taps(shape, tile, tmp_path):
    (answer,) = drive.run([drive.plan_case(*shape)], tmp_path)
    assert drive.TILES[np.frombuffer(answer, np.int64)[3]] == tile


def test_one_wave_of_blocks_takes_all_weights(tmp_path):
    """On 132 multiprocessors: 128 tiles, or 32 in four splits, or 8 in sixteen."""
    shapes = [(512, 512, 512, 4), (512, 256, 256, 8), (512, 128, 128, 16)]
    answers = drive.run([drive.plan_case(*shape) for shape in shapes], tmp_path)
    splits = [np.frombuffer(answer, np.int64)[0] for answer in answers]
    assert splits == [1, 4, 16]


@pytest.mark.parametrize(
    ("kind", "dtype", "cycles"),
    [
        ("window", torch.float32, [1088, 992, 952, 984]),
        ("taps", torch.float32, [889, 868, 868, 868]),
        ("taps", torch.float16, [443, 434, 348, 441]),
    ],
)
def test_cycles_of_shared_memory(kind, dtype, cycles, tmp_path):
    """It bounds these kernels: see what tensor cores take in shared_cycles.py."""
    counted = shared_cycles.counts_of_layers(
        shared_cycles.LAYERS, tmp_path, kind, dtype
    )
    assert [round(n) for n, _ in counted] == cycles
