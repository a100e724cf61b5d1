"""The CUDA kernel of products of warpgroups, run on the CPU, and what it stands on."""

import subprocess

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

# ---- the stand-ins for what only Hopper has ----


@pytest.mark.parametrize("row_bytes", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("box", "right"),
        ("no_wait", "wrong"),
        ("wrong_parity", "wrong"),
        ("more_bytes", "threads wait for others in vain"),
        ("fewer_bytes", "threads wait for others in vain"),
        ("unpublished", "a copy that does not see its barrier"),
        ("box_left", "a block ends with copies under way"),
        ("shared", "right"),
        ("not_shared", "threads wait for others in vain"),
        ("late", "right"),
        ("too_late", "an arrival in a block that has ended"),
        ("products", "right"),
        ("products_no_wait", "wrong"),
        ("no_fence", "a product without a fence"),
        ("rows_apart", "wrong"),
    ],
)
def test_emulator_of_hopper_notices(use, says, row_bytes):
    done = subprocess.run(
        [drive.build("planted_hopper"), use, str(row_bytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert says in done.stdout + done.stderr
    assert (done.returncode == 0) == (says in ("right", "wrong"))


# ---- grad_moments ----

TILES = ("wgmma", "slim_wgmma")


def cases():
    """Make each case for both tiles."""
    for name, shape in taps_cases.WARPGROUPS.items():
        input, grad, weight, arguments = make(**shape)
        for tile in TILES:
            wish = {"allow_tf32": True, "tile": tile}
            yield f"{name} {tile}", (input, grad, weight, arguments | wish)


def test_sums_by_products_of_warpgroups(tmp_path):
    named = []
    for name, (input, grad, *rest) in cases():
        named.append((name, (as_tf32(input), as_tf32(grad), *rest)))
    check_all(named, tmp_path)


def test_groups_shared_by_blocks_of_warpgroups(tmp_path):
    """Parts of groups, empty ones too; and whole groups for each block."""
    named = []
    for n, group_size, size in [(9, 9, 8), (7, 90, 4), (6, 3, 16), (9, 1, 8)]:
        shape = dict(size=(size, size), kernel=(3, 3), padding=(1, 1))
        input, grad, weight, arguments = make(n=n, c=16, o=64, **shape)
        arguments |= {"group_size": group_size, "multiprocessors": 13}
        arguments |= {"allow_tf32": True, "tile": "wgmma"}
        case = as_tf32(input), as_tf32(grad), weight, arguments
        named.append((f"{n} samples, groups of {group_size}", case))
    check_all(named, tmp_path)


def test_images_within_larger_tensors(tmp_path):
    """Samples and channels may be further apart than their positions take."""
    *pair, weight, arguments = make(**taps_cases.CASES["8_wide_group_remainder"])
    wider = [torch.full((len(x), 2 * x.shape[1], 9, 8), torch.nan) for x in pair]
    for x, wide in zip(pair, wider, strict=True):
        wide[:, ::2, :8] = as_tf32(x)
    strided = [wide[:, ::2, :8] for wide in wider]
    wish = {"allow_tf32": True, "tile": "wgmma"}
    check_all([("", (*strided, weight, arguments | wish))], tmp_path)


def test_copies_round_operands_to_nearest(tmp_path):
    """Where all terms have one sign, operands that are cut off lose 7e-4 of the sum."""
    input, grad, *rest, arguments = make(**taps_cases.CASES["16_wide"])
    wish = {"allow_tf32": True, "tile": "wgmma"}
    case = input.abs(), grad.abs(), *rest, arguments | wish
    check_all([("", case)], tmp_path, 1e-4)


def test_moments_do_not_depend_on_the_threads_order(tmp_path):
    input, grad, weight, arguments = make(**taps_cases.CASES["8_wide_three_stages"])
    wish = {"allow_tf32": True, "tile": "slim_wgmma"}
    cases = [
        (input, grad, weight, arguments | wish | {"seed": seed}) for seed in (1, 2, 3)
    ]
    results = [r for r, _ in moments(cases, tmp_path)]
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


# ---- the switch ----


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((512, 64, 64, 32), "slim_wgmma"),
        ((512, 128, 128, 16), "wgmma"),
        ((512, 512, 512, 4), "wgmma"),
        ((512, 60, 100, 8), "wgmma"),
        ((512, 64, 64, 28), "slim_lanes"),  # of no usual width
        ((512, 64, 64, 2), "slim_window"),
    ],
)
def test_plan_takes_products_of_warpgroups(shape, tile, monkeypatch, tmp_path):
    monkeypatch.setenv("FISHERPRUNE_CUDA_WGMMA", "1")
    (answer,) = drive.run([drive.plan_case(*shape)], tmp_path)
    assert drive.TILES[np.frombuffer(answer, np.int64)[3]] == tile


@pytest.mark.parametrize(
    ("value", "archs", "device", "message"),
    [
        (None, "8.0", (8, 0), ""),
        ("0", "8.0", (8, 0), ""),
        ("", "8.0", (8, 0), ""),
        ("1", "8.0;9.0;9.0a", (9, 0), ""),
        ("yes", "9.0a", (9, 0), "FISHERPRUNE_CUDA_WGMMA must be 0 or 1, got yes"),
        (
            "1",
            "8.0;9.0+PTX",
            (9, 0),
            "FISHERPRUNE_CUDA_WGMMA=1 needs kernels for 9.0a, but they are built for "
            '8.0;9.0+PTX: build with TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX;9.0a", or unset '
            "the variable",
        ),
        (
            "1",
            "9.0a",
            (10, 0),
            "FISHERPRUNE_CUDA_WGMMA=1 needs a device of compute capability 9.0, got "
            "10.0: unset the variable",
        ),
    ],
)
def test_switch(value, archs, device, message, monkeypatch, tmp_path):
    monkeypatch.delenv("FISHERPRUNE_CUDA_WGMMA", raising=False)
    if value is not None:
        monkeypatch.setenv("FISHERPRUNE_CUDA_WGMMA", value)
    (answer,) = drive.run([drive.switch_case(archs, *device)], tmp_path)
    assert answer.decode() == message


def test_cycles_of_shared_memory(tmp_path):
    """And bytes of the second-level cache: see what bounds them in shared_cycles.py."""
    counted = shared_cycles.counts_of_layers(shared_cycles.LAYERS, tmp_path, "wgmma")
    assert [round(cycles) for cycles, _ in counted] == [555, 548, 537, 548]
    assert [round(read) for _, read in counted] == [19015, 10837, 8647, 8192]
