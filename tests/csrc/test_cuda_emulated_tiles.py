"""The CUDA kernels that do not gather, run on the CPU, and the plans that take them."""

from collections import Counter

import dense_cases
import numpy as np
import pytest
import torch
import window_cases
from emulated import as_tf32, check_all, distances, moments
from emulator import drive
from moment_cases import LAYOUTS, make

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++, x86-64"
)

# ---- images in shared memory ----


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
def test_images_in_shared_memory_are_rounded(tile, tmp_path):
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
    case = make(n=2, c=14, o=128, size=(8, 8), kernel=(3, 3), padding=(1, 1))
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
        # more time and 32 MB of workspace rather than 50.
        ((512, 248, 256, 8), 7, 1),
        ((512, 248, 256, 8, 512), 7, 7),  # of one group
        ((512, 504, 512, 4), 3, 1),  # 2 would take 8 % more
        ((64, 248, 256, 8), 3, 1),  # 2 would take 36 % more
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
    ("shape", "how", "tile"),
    [
        ((512, 512, 512, 2), {}, "window"),
        ((512, 504, 512, 4), {}, "window"),
        ((512, 64, 64, 32), {"kernel": 5}, "slim_window"),
        ((512, 512, 512, 6), {"kernel": 5}, "tall"),  # no rows of 16 bytes
        ((512, 3, 64, 32), {}, "small"),  # most of a window would be empty
        ((512, 256, 512, 8), {"kernel": 1, "channels_last": True}, "dense"),
        ((512, 256, 512, 8), {"kernel": 1}, "dense"),
        ((512, 254, 512, 8), {"kernel": 1, "channels_last": True}, "tall"),
    ],
)
def test_plan_takes_the_tile_for_the_layer(shape, how, tile, tmp_path):
    (answer,) = drive.run([drive.plan_case(*shape, **how)], tmp_path)
    assert drive.TILES[np.frombuffer(answer, np.int64)[3]] == tile


# ---- operands without taps, with their channels side by side ----


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


def test_dense_kernel_in_tf32(tmp_path):
    """To the bit as if the operands had been rounded before."""
    for name, shape in dense_cases.CASES.items():
        input, grad, weight, arguments = make(**shape)
        if len(weight) == 4:
            input, grad = map(LAYOUTS["channels_last"], (input, grad))
        arguments |= {"tile": "dense", "allow_tf32": True}
        given = (input, grad), (as_tf32(input), as_tf32(grad))
        cases = [(*operands, weight, dict(arguments)) for operands in given]
        (raw, _), (rounded, truth) = moments(cases, tmp_path)
        assert all(map(torch.equal, raw, rounded)), name
        assert max(distances(rounded, truth)) <= 1e-5, name


def test_dense_kernel_adds_long_groups_in_float32(tmp_path):
    """Tensor cores cut off: 784 products in a row would lose 1e-5."""
    *case, options = make(
        n=16, c=8, o=16, positions=(784,), group_size=16, dtype=torch.bfloat16
    )
    case[:2] = (x.abs() for x in case[:2])
    check_all([("", (*case, options | {"tile": "dense"}))], tmp_path, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_kernel_is_the_plan_of_a_sequence(dtype, tmp_path):
    """The bits tell: it adds in another order than those that gather."""
    *case, arguments = make(**dense_cases.CASES["197_positions"], dtype=dtype)
    tiles = [{}, {"tile": "dense"}, {"tile": "tall"}]
    cases = [(*case, arguments | tile | {"allow_tf32": True}) for tile in tiles]
    planned, dense, tall = (r for r, _ in moments(cases, tmp_path))
    assert all(map(torch.equal, planned, dense))
    assert not all(map(torch.equal, planned, tall))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stride", [2, 4, 12])
def test_sequences_that_do_not_suit_the_dense_kernel(stride, dtype, tmp_path):
    """Rows of channels that do not begin at multiples of 16 bytes, or end within."""
    named = []
    for features in (16, 12, 10):
        operands = (torch.randn(3, 20, features + stride) for _ in range(2))
        pair = [as_tf32(x).to(dtype).float() for x in operands]
        pair = [x.to(dtype)[..., :features] for x in pair]
        weight = torch.Size((features, features))
        named.append((f"{features}", (*pair, weight, {"allow_tf32": True})))
    check_all(named, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_products_over_samples(dtype, tmp_path):
    """Two products, of the operands and of their squares, which are float32."""
    *pair, weight, options = make(n=43, c=512, o=520, positions=())
    five_bits = -(1 << 19)  # so that the squares are TF32s, too
    pair = [(x.view(torch.int32) & five_bits).view(torch.float32) for x in pair]
    case = (*(x.to(dtype) for x in pair), weight, options | {"allow_tf32": True})
    check_all([("", case)], tmp_path)
