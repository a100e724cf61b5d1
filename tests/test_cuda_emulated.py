"""The CUDA kernels' own source, run on the CPU by tests/emulator, against the twins."""

import subprocess
from collections import Counter

import dense_cases
import numpy as np
import pytest
import torch
import window_cases
from emulator import drive
from moment_cases import (
    CASES,
    LAYOUTS,
    STORED,
    accumulators,
    expanded,
    make,
    vectors_that_end_within_a_row,
)

from fisherprune import reference

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++"
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


def as_images(input, grad, weight):
    """Give linear layers the shapes that `ops.grad_moments` gives them."""
    if len(weight) == 4:
        return input, grad, weight
    flat = [
        x.reshape(len(x), x.shape[1:-1].numel(), x.shape[-1]).mT.unsqueeze(-1)
        for x in (input, grad)
    ]
    return *flat, torch.Size((*weight, 1, 1))


def moments(cases, folder):
    """Run (input, grad, weight, arguments) cases, yield each one's result and truth."""
    encoded, truths = [], []
    for input, grad, weight, arguments in cases:
        input, grad, weight = as_images(input, grad, weight)
        options = {
            k: arguments.pop(k)
            for k in ("allow_tf32", "tile", "multiprocessors", "seed", "shift")
            if k in arguments
        }
        start = accumulators(weight)
        encoded.append(drive.moments_case(input, grad, *start, **arguments, **options))
        truth = [a.double() for a in start]
        reference.grad_moments(input, grad, *truth, **arguments)
        truths.append(truth)
    arrays = drive.run(encoded, folder)
    results = [torch.from_numpy(np.frombuffer(a, np.float32).copy()) for a in arrays]
    for i, truth in enumerate(truths):
        pair = results[2 * i : 2 * i + 2]
        yield [r.view(t.shape) for r, t in zip(pair, truth, strict=True)], truth


def distances(results, truths):
    """Return the relative errors, norm-wise, of sum and of sum_sq."""
    return [
        ((r - t).norm() / t.norm()).item() if t.numel() else 0.0
        for r, t in zip(results, truths, strict=True)
    ]


def check_all(named, folder, bound=1e-5):
    pairs = moments([c for _, c in named], folder)
    for (name, _), (results, truths) in zip(named, pairs, strict=True):
        assert max(distances(results, truths)) <= bound, name


def small(name):
    """Make a named case, of few enough samples and positions for an emulator."""
    shape = dict(CASES[name])
    if "size" in shape:
        shape["size"] = tuple(min(size, 50) for size in shape["size"])
    return make(**shape | {"n": min(shape["n"], 11)})


def as_tf32(x):
    """Round to the eleven bits that the tensor cores take, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


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


@pytest.mark.parametrize("tile", ["window", "slim_window"])
def test_images_in_shared_memory(tile, tmp_path):
    named = []
    for name, shape in window_cases.CASES.items():
        input, grad, weight, arguments = make(**shape)
        arguments |= {"tile": tile, "allow_tf32": True}
        named.append((name, (as_tf32(input), as_tf32(grad), weight, arguments)))
    check_all(named, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", ["window", "slim_window"])
def test_images_of_16_bits_in_shared_memory(tile, dtype, tmp_path):
    """Which are widened there."""
    named = []
    for name, shape in window_cases.CASES.items():
        *case, arguments = make(**shape, dtype=dtype)
        arguments |= {"tile": tile, "allow_tf32": True}
        named.append((name, (*case, arguments)))
    check_all(named, tmp_path)


@pytest.mark.parametrize("tile", ["window", "slim_window"])
def test_images_are_rounded_in_shared_memory(tile, tmp_path):
    """To the bit as if they had been rounded before."""
    for shape in window_cases.CASES.values():
        input, grad, weight, arguments = make(**shape)
        arguments |= {"tile": tile, "allow_tf32": True}
        given = (input, grad), (as_tf32(input), as_tf32(grad))
        cases = [(*operands, weight, dict(arguments)) for operands in given]
        (raw, _), (rounded, _) = moments(cases, tmp_path)
        assert all(map(torch.equal, raw, rounded)), shape


@pytest.mark.parametrize("tile", ["window", "slim_window"])
def test_rows_that_no_output_sees_may_hold_anything(tile, tmp_path):
    """Also where they lie in a window, beside a unit that is not full."""
    input, grad, weight, arguments = make(
        n=3, c=3, o=6, size=(11, 8), kernel=(3, 3), stride=(3, 2), padding=(0, 1)
    )
    input[:, :, 9:] = torch.inf
    arguments |= {"tile": tile, "allow_tf32": True}
    check_all([("", (as_tf32(input), as_tf32(grad), weight, arguments))], tmp_path)


def most_words_in_a_bank(pitch, channel, stride, first):
    """Count, of the words that a warp reads at once, those in the fullest bank.

    Eight weights of 3 x 3 filters from `first` on, at four positions each.
    """
    words = {
        weight // 9 * channel + weight % 9 // 3 * pitch + weight % 3 + position * stride
        for weight in range(first, first + 8)
        for position in range(4)
    }
    return max(Counter(word % 32 for word in words).values())


@pytest.mark.parametrize(("stride", "bound"), [(1, 1), (2, 1.34)])
def test_images_lie_in_different_banks(stride, bound, tmp_path):
    widths = (4, 8, 16, 32)
    asked = drive.run([drive.window_case(w, stride) for w in widths], tmp_path)
    for width, answer in zip(widths, asked, strict=True):
        place = np.frombuffer(answer, np.int64)
        ways = [most_words_in_a_bank(*place, stride, i) for i in range(0, 288, 8)]
        assert np.mean(ways) <= bound, width


def test_images_in_shared_memory_are_the_plan_of_a_network_layer(tmp_path):
    """And no plan where float32 precision is asked for: the bits tell."""
    case = make(n=2, c=16, o=128, size=(8, 8), kernel=(3, 3), padding=(1, 1))
    tiles = [{}, {"tile": "window"}, {"tile": "tall"}]
    cases = [(*case[:3], case[3] | tile | {"allow_tf32": True}) for tile in tiles]
    planned, window, tall = (r for r, _ in moments(cases, tmp_path))
    assert all(map(torch.equal, planned, window))
    assert not all(map(torch.equal, planned, tall))
    check_all([("ieee", case)], tmp_path)


@pytest.mark.parametrize(
    ("shape", "splits", "parts"),
    [
        # 36 tiles: 11 splits fill three waves of 132 blocks; 7 fill two, for 0.6 %
        # more time and 33 MB of workspace rather than 52.
        ((512, 256, 256, 8), 7, 1),
        ((512, 256, 256, 8, 512), 7, 7),  # of one group
        ((512, 512, 512, 4), 3, 1),  # 2 would take 8 % more
        ((64, 256, 256, 8), 3, 1),  # 2 would take 36 % more
    ],
)
def test_plan_takes_the_fewest_splits_of_nearly_the_shortest_time(
    shape, splits, parts, tmp_path
):
    (answer,) = drive.run([drive.plan_case(*shape)], tmp_path)
    weights = shape[1] * shape[2] * 9
    floats = splits if parts > 1 else 2 * splits if splits > 1 else 0
    expected = [splits, parts, 4 * floats * weights]
    assert np.frombuffer(answer, np.int64)[:3].tolist() == expected


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((512, 512, 512, 2), "window"),
        ((512, 512, 512, 4), "window"),
        ((512, 64, 64, 32), "slim_window"),
        ((512, 512, 512, 3), "tall"),  # no rows of 16 bytes
        ((512, 3, 64, 32), "small"),  # most of a window would be empty
    ],
)
def test_plan_takes_the_tile_for_the_layer(shape, tile, tmp_path):
    (answer,) = drive.run([drive.plan_case(*shape)], tmp_path)
    assert drive.TILES[np.frombuffer(answer, np.int64)[3]] == tile


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_dense_kernel(dtype, allow_tf32, tmp_path):
    """As exact as in float32: the operands' bits are all there."""
    named = []
    for name, shape in dense_cases.CASES.items():
        input, grad, weight, arguments = make(**shape, dtype=dtype)
        if len(weight) == 4:
            input, grad = map(LAYOUTS["channels_last"], (input, grad))
        arguments |= {"tile": "dense", "allow_tf32": allow_tf32}
        named.append((name, (input, grad, weight, arguments)))
    check_all(named, tmp_path)


def test_dense_kernel_adds_long_groups_in_float32(tmp_path):
    """Tensor cores cut off: 784 products in a row would lose 1e-5."""
    *case, options = make(
        n=16, c=8, o=16, positions=(784,), group_size=16, dtype=torch.bfloat16
    )
    case[:2] = (x.abs() for x in case[:2])
    check_all([("", (*case, options | {"tile": "dense"}))], tmp_path, 2e-6)


def test_dense_kernel_is_the_plan_of_a_sequence(tmp_path):
    """The bits tell: it adds in another order than those that gather."""
    *case, arguments = make(**dense_cases.CASES["197_positions"], dtype=torch.bfloat16)
    tiles = [{}, {"tile": "dense"}, {"tile": "tall"}]
    cases = [(*case, arguments | tile | {"allow_tf32": True}) for tile in tiles]
    planned, dense, tall = (r for r, _ in moments(cases, tmp_path))
    assert all(map(torch.equal, planned, dense))
    assert not all(map(torch.equal, planned, tall))


@pytest.mark.parametrize("stride", [4, 12])
def test_sequences_that_do_not_suit_the_dense_kernel(stride, tmp_path):
    """Rows of channels that do not begin at multiples of 16 bytes, or end within."""
    named = []
    for features in (16, 12):
        input, grad = (torch.randn(3, 20, features + stride).half() for _ in range(2))
        pair = input[..., :features], grad[..., :features]
        weight = torch.Size((features, features))
        named.append((f"{features}", (*pair, weight, {})))
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
    rng = np.random.default_rng(0)
    widths = np.int64(2) ** rng.integers(0, 31, 20000) + rng.integers(-2, 3, 20000)
    widths = widths.clip(1, 2**31 - 1)
    near = rng.integers(0, 2**31, 20000) // widths * widths + rng.integers(-1, 2, 20000)
    positions = near.clip(0, 2**31 - 1)
    [rows] = drive.run([drive.divider_case(positions, widths)], tmp_path)
    np.testing.assert_array_equal(np.frombuffer(rows, np.int64), positions // widths)
