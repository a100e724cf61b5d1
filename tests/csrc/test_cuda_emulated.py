"""The CUDA kernels' own source, run on the CPU by the emulator, against the twins."""

import subprocess

import numpy as np
import pytest
import torch
from emulated import as_tf32, check_all, distances, moments, small
from emulator import drive
from moment_cases import (
    CASES,
    LAYOUTS,
    STORED,
    expanded,
    make,
    vectors_that_end_within_a_row,
)

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++, x86-64"
)

# ---- the emulator notices what it is there for ----


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("barrier", "right"),
        ("warp_barrier", "wrong"),
        ("no_barrier", "wrong"),
        ("wait", "right"),
        ("no_wait", "wrong"),
        ("within_shared", "right"),
        ("past_shared", "heap-buffer-overflow"),
        ("read_past_shared", "heap-buffer-overflow"),
        ("past_global", "heap-buffer-overflow"),
        ("lonely_barrier", "threads wait for others in vain"),
        ("diverged", "lanes of a warp meet in different operations"),
        ("copies_left", "a thread ends with copies under way"),
        ("last_block", "right"),
        ("highest_block", "wrong"),
    ],
)
def test_emulator_notices(kernel, says):
    done = subprocess.run(
        [drive.build("planted"), kernel], capture_output=True, text=True, check=False
    )
    assert says in done.stdout + done.stderr
    assert (done.returncode == 0) == (says in ("right", "wrong"))


# ---- grad_moments ----


def test_moments_of_every_case(tmp_path):
    check_all([(name, small(name)) for name in CASES], tmp_path)


def test_moments_in_tf32(tmp_path):
    """With operands that are TF32 already only the sums are rounded, or cut off."""
    named = []
    for name in CASES:
        input, grad, weight, arguments = small(name)
        arguments["allow_tf32"] = True
        named.append((name, (as_tf32(input), as_tf32(grad), weight, arguments)))
    check_all(named, tmp_path, 3e-4)


def test_tf32_rounds_operands(tmp_path):
    input, grad, weight, arguments = small("plain_3x3")
    exact, rounded = moments(
        [
            (input, grad, weight, arguments | {"allow_tf32": True}),
            (as_tf32(input), as_tf32(grad), weight, arguments | {"allow_tf32": True}),
        ],
        tmp_path,
    )
    assert all(map(torch.equal, exact[0], rounded[0]))
    assert 1e-5 < distances(*exact)[0] < 1e-3


@pytest.mark.parametrize("tile", ["small", "square", "tall"])
def test_every_tile_fits_every_case(tile, tmp_path):
    names = ["everything_uneven", "pointwise", "grouped_wide", "few_positions"]
    named = []
    for name in names:
        for allow_tf32 in (False, True):
            input, grad, weight, arguments = small(name)
            arguments |= {"tile": tile, "allow_tf32": allow_tf32}
            named.append((name, (as_tf32(input), as_tf32(grad), weight, arguments)))
    check_all(named, tmp_path)


def test_moments_of_every_layout(tmp_path):
    named = []
    for name in STORED:
        for how, store in LAYOUTS.items():
            input, grad, weight, arguments = small(name)
            stored = (store(input), store(grad), weight, arguments)
            named.append((f"{name} {how}", stored))
    check_all(named, tmp_path)


def test_expanded_tensors(tmp_path):
    check_all([("", expanded())], tmp_path)


def test_vectors_that_end_within_a_row(tmp_path):
    """Sixteen-byte copies of rows whose length is no multiple of four."""
    cases = vectors_that_end_within_a_row()
    check_all([(str(c[0].shape[-1]), c) for c in cases], tmp_path)


def test_moments_of_unaligned_data(tmp_path):
    input, grad, weight, arguments = small("pointwise")
    check_all([("", (input, grad, weight, arguments | {"shift": 4}))], tmp_path)


def test_moments_of_half_precision(tmp_path):
    named = []
    for input_dtype, grad_dtype in [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ]:
        for name in ("plain_3x3", "linear_positions", "linear_large"):
            input, grad, weight, arguments = small(name)
            pair = input.to(input_dtype), grad.to(grad_dtype)
            named.append((f"{name} {input_dtype}", (*pair, weight, arguments)))
    check_all(named, tmp_path)


@pytest.mark.parametrize("tile", ["small", "square", "tall"])
def test_half_precision_fits_every_tile(tile, tmp_path):
    """Rows that the threads of a block do not share out evenly, and are not there."""
    named = []
    for name in ("many_outputs", "everything_uneven", "few_positions"):
        input, grad, weight, arguments = small(name)
        pair = input.bfloat16(), grad.bfloat16()  # eight bits are a TF32 already
        arguments |= {"tile": tile, "allow_tf32": True}
        named.append((name, (*pair, weight, arguments)))
    check_all(named, tmp_path)


def test_extreme_half_floats(tmp_path):
    input = torch.tensor([6e-8, 6.1e-5, 65504.0, -1.0]).half().reshape(1, 1, 4, 1)
    grad = torch.ones(1, 1, 4, 1).half()
    check_all([("", (input, grad, torch.Size((1, 1, 1, 1)), {}))], tmp_path)


def test_many_splits_and_flushes(tmp_path):
    """More groups than a register sums, samples split over blocks, and both."""
    shapes = [
        # samples, outputs, group size, multiprocessors
        (300, 5, 1, 1),
        (65, 5, 9, 40),
        (560, 5, 2, 2),
        (600, 40, 1, 1),
    ]
    named = []
    for n, o, group_size, multiprocessors in shapes:
        case = make(n=n, c=2, o=o, size=(3, 3), kernel=(2, 2), group_size=group_size)
        case[-1]["multiprocessors"] = multiprocessors
        named.append((f"{n} samples", case))
    check_all(named, tmp_path)


def test_groups_that_end_within_a_stage(tmp_path):
    """What is flushed between two stages must not be the sum of an open group."""
    named = []
    for n, group_size, size in [(300, 9, 3), (300, 5, 4), (2700, 5, 4)]:
        case = make(
            n=n, c=2, o=40, size=(size, size), kernel=(2, 2), group_size=group_size
        )
        case[-1]["multiprocessors"] = 1
        named.append((f"{n} samples, groups of {group_size}", case))
    check_all(named, tmp_path)


def test_groups_shared_by_blocks(tmp_path):
    """Fewer groups than blocks; a last group of fewer samples than blocks share it."""
    named = []
    for n, group_size, size in [(40, 40, 8), (40, 90, 3), (41, 20, 8), (35, 17, 8)]:
        for tf32 in (False, True):  # in TF32 the images lie in shared memory
            input, grad, weight, arguments = make(
                n=n, c=2, o=9, size=(size, size), kernel=(3, 3), padding=(1, 1)
            )
            arguments |= {"group_size": group_size, "multiprocessors": 9}
            arguments |= {"allow_tf32": tf32}
            case = as_tf32(input), as_tf32(grad), weight, arguments
            named.append((f"{n} samples, groups of {group_size}", case))
    check_all(named, tmp_path)


def test_samples_of_few_positions(tmp_path):
    """Two share a slab: odd and even numbers of them, groups that end between them."""
    named = []
    for positions in range(1, 10):
        for n, group_size in [(1, 1), (6, 1), (7, 1), (7, 2), (8, 3), (5, 9)]:
            case = make(n=n, c=9, o=5, positions=(positions,), group_size=group_size)
            case[-1]["multiprocessors"] = 1 + positions % 2 * 30
            named.append((f"{n} of {positions}, groups of {group_size}", case))
    check_all(named, tmp_path)


def test_moments_do_not_depend_on_the_threads_order(tmp_path):
    input, grad, weight, arguments = small("grouped_wide")
    cases = [
        (input, grad, weight, arguments | {"seed": seed, "multiprocessors": 60})
        for seed in (1, 2, 3)
    ]
    results = [r for r, _ in moments(cases, tmp_path)]
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_long_sums_of_one_sign_keep_their_precision(tmp_path):
    """Tensor cores cut off sums, which adds up where all terms have one sign."""
    input, grad, weight, arguments = make(n=2, c=1, o=3, size=(64, 64), kernel=(1, 1))
    check_all([("", (input.abs(), grad.abs(), weight, arguments))], tmp_path, 1e-6)


def test_division_by_multiplication_is_exact(tmp_path):
    rng = np.random.default_rng(torch.initial_seed())
    widths = np.int64(2) ** rng.integers(0, 31, 20000) + rng.integers(-2, 3, 20000)
    widths = widths.clip(1, 2**31 - 1)
    near = rng.integers(0, 2**31, 20000) // widths * widths + rng.integers(-1, 2, 20000)
    positions = near.clip(0, 2**31 - 1)
    [rows] = drive.run([drive.divider_case(positions, widths)], tmp_path)
    np.testing.assert_array_equal(np.frombuffer(rows, np.int64), positions // widths)
