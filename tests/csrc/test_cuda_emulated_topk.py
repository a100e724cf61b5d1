"""global_topk and its steps on CUDA, run on the CPU by the emulator."""

import numpy as np
import pytest
import torch
from emulator import drive
from topk_cases import VALUES, case

from fisherprune.ops import reference

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++, x86-64"
)


def topk(cases, folder, **options):
    """Run (scores, keep) or (scores, keep, ranks) cases, yield what the op yields."""
    encoded = [drive.topk_case(*c, **options) for c in cases]
    arrays = iter(drive.run(encoded, folder))
    for scores, keep, *_ in cases:
        thresholds = np.frombuffer(next(arrays), np.float32)
        nonfinite = np.frombuffer(next(arrays), np.int64)
        masks = [
            [np.frombuffer(next(arrays), bool).reshape(s.shape) for s in scores]
            for _ in keep
        ]
        yield masks, thresholds, nonfinite


def check_topk(cases, folder, **options):
    for (scores, keep, *ranks), (masks, thresholds, nonfinite) in zip(
        cases, topk(cases, folder, **options), strict=True
    ):
        tensors = [torch.from_numpy(s) for s in scores]
        expected, levels = reference.global_topk(tensors, keep, ranks=sum(ranks, []))
        assert not nonfinite.any()
        np.testing.assert_array_equal(thresholds, levels.numpy())
        for got, want in zip(masks, expected, strict=True):
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(g, w.numpy())


@pytest.mark.parametrize("which", [slice(6), slice(6, None)])
def test_topk_of_every_case(which, tmp_path):
    cases = [case(name, 1500) for name in VALUES]
    check_topk([(scores, keep[which]) for scores, keep in cases], tmp_path)


@pytest.mark.parametrize("masked", [0, 1, 3])
def test_topk_of_ranks_without_masks(masked, tmp_path):
    cases = [case(name, 1500) for name in VALUES]
    split = [(scores, keep[:masked], keep[masked:6]) for scores, keep in cases]
    check_topk(split, tmp_path)


def test_topk_of_ranks_beside_ties_over_several_chunks(tmp_path):
    cases = [case(name, 30000) for name in ("few_distinct", "late_ties", "all_equal")]
    split = [(scores, keep[4:6], keep[6:]) for scores, keep in cases]
    check_topk(split, tmp_path, multiprocessors=1)


def test_topk_over_several_chunks(tmp_path):
    cases = [
        (scores, keep[4:8])
        for name in ("gaussian", "all_equal", "few_distinct", "late_ties")
        for scores, keep in [case(name, 30000)]
    ]
    check_topk(cases, tmp_path)


@pytest.mark.parametrize("shift", [4, 8])
def test_topk_of_unaligned_scores(shift, tmp_path):
    """More than a chunk, so that whole ones are among them."""
    scores, keep = case("few_distinct", 20000)
    check_topk([(scores, keep[:3])], tmp_path, shift=shift)


@pytest.mark.parametrize("tensors", [33, 350, 1100])
def test_topk_of_many_tensors(tensors, tmp_path):
    """More than a warp looks at once, than a launch's parameters hold, than a block."""
    values = torch.randint(9, (2 * tensors,)).float().numpy()
    check_topk([(np.split(values, tensors), [tensors // 3, tensors])], tmp_path)


def test_topk_does_not_depend_on_the_threads_order(tmp_path):
    scores, keep = case("few_distinct", 9000)
    for seed in (2, 3):
        check_topk([(scores, keep[:6])], tmp_path, seed=seed, multiprocessors=1)


@pytest.mark.parametrize("size", [0, 1, 255, 257, 2048, 70_001])
def test_search_in_counts(size, tmp_path):
    """More than a block shares out in two rounds: the chunks of 2^29 scores."""
    counts = torch.randint(4, (size,)).numpy()
    total, through = counts.sum(), counts.cumsum()
    left = np.unique(np.linspace(1, total, 20).astype(np.int64)) if total else []
    beyond = [0, total + 1, total + 10**12]
    [found] = drive.run([drive.search_case(counts, [*left, *beyond])], tmp_path)
    found = np.frombuffer(found, np.int64).reshape(-1, 3).tolist()
    at = np.searchsorted(through, left)
    truth = [[i, through[i] - counts[i], counts[i]] for i in at]
    assert found == [*truth, [0, 0, 0], *[[size, total, 0]] * 2]


def test_topk_of_nothing(tmp_path):
    check_topk([([np.zeros((0, 3), np.float32)], [0])], tmp_path)


@pytest.mark.parametrize("keep", [[], [5], [5, 9000]])
def test_nonfinite_scores_are_counted_per_tensor(keep, tmp_path):
    scores = np.split(torch.rand(9000).numpy(), [100, 300])
    scores[0][7], scores[2][[0, 8500]], scores[2][8192] = np.nan, np.inf, -np.inf
    [(_, _, nonfinite)] = topk([(scores, keep)], tmp_path)
    assert nonfinite.tolist() == [1, 0, 3]


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF])
def test_one_score_that_is_not_finite_is_counted(bits, tmp_path):
    """None but its own first digit says so: not that of the largest finite number."""
    huge = np.finfo(np.float32).max
    scores = [np.array([huge, -1] * 50, np.float32), np.zeros(9, np.float32)]
    scores[1].view(np.uint32)[4] = bits
    [(_, _, nonfinite)] = topk([(scores, [50])], tmp_path)
    assert nonfinite.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("prefix_bits", "digit_bits"), [(0, 11), (11, 11), (22, 10), (3, 13), (0, 15)]
)
def test_histogram(prefix_bits, digit_bits, tmp_path):
    scores, _ = case("squared", 3000)
    tensors = [torch.from_numpy(s) for s in scores]
    first_key = int(reference._keys(torch.cat([t.flatten() for t in tensors]))[0])
    prefix = first_key >> (32 - prefix_bits)
    arguments = prefix, prefix_bits, digit_bits
    [counts] = drive.run([drive.histogram_case(scores, *arguments)], tmp_path)
    expected = reference.topk_histogram(tensors, *arguments)
    np.testing.assert_array_equal(np.frombuffer(counts, np.int64), expected.numpy())
    assert expected.sum() > 0


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.5])
def test_masks_with_ties_per_tensor(threshold, tmp_path):
    values, _ = case("few_distinct", 20000)
    scores = [*values, np.zeros(0, np.float32)]
    ties = [3, 0, 10**6, 900, 2000, *[1] * len(scores)][: len(scores)]
    arrays = drive.run([drive.masks_case(scores, threshold, ties)], tmp_path)
    expected = reference.topk_masks(
        [torch.from_numpy(s) for s in scores], threshold, ties
    )
    for got, want in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(np.frombuffer(got, bool), want.flatten().numpy())
