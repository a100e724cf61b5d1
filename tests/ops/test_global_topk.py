"""global_topk and its steps equal the stable sort of the reference, entry by entry."""

import re

import numpy as np
import pytest
import topk_cases
import torch
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fisherprune import FisherpruneError, ops
from fisherprune.ops import reference

SIZES = [1, 17, 3_000, 300_007]  # the last is sampled, the others collected as they are


def tensors_of(arrays):
    return [torch.from_numpy(a) for a in arrays]


def assert_same(found, expected):
    (masks, thresholds), (true_masks, true_thresholds) = found, expected
    torch.testing.assert_close(thresholds, true_thresholds, rtol=0, atol=0)
    assert len(masks) == len(true_masks)
    for ours, truth in zip(masks, true_masks, strict=True):
        assert [m.dtype for m in ours] == [torch.bool] * len(truth)
        for one, true in zip(ours, truth, strict=True):
            assert torch.equal(one, true)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", topk_cases.VALUES)
def test_equals_reference(name, n):
    arrays, keep = topk_cases.case(name, n)
    scores = tensors_of(arrays)
    before = [s.clone() for s in scores]
    assert_same(ops.global_topk(scores, keep), reference.global_topk(scores, keep))
    assert all(map(torch.equal, scores, before))


POOL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028235e38, 1.0000001, 0.99999994]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_reference_on_any_lists(data):
    value = st.sampled_from(POOL) | st.floats(
        width=32, allow_nan=False, allow_infinity=False
    )
    lists = data.draw(st.lists(st.lists(value, max_size=20), min_size=1, max_size=5))
    scores = [torch.tensor(x, dtype=torch.float32) for x in lists]
    total = sum(s.numel() for s in scores)
    numbers = st.lists(st.integers(0, total), max_size=4)
    keep, ranks = data.draw(numbers), data.draw(numbers)
    found = ops.global_topk(scores, keep, ranks=ranks)
    assert_same(found, reference.global_topk(scores, keep, ranks=ranks))
    assert_same(ops.global_topk(scores, keep), reference.global_topk(scores, keep))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", topk_cases.VALUES)
def test_ranks_give_thresholds_alone(name, n):
    """The masks are those of calls without ranks, the thresholds those of masks."""
    arrays, keep = topk_cases.case(name, n)
    scores = tensors_of(arrays)
    masks, thresholds = ops.global_topk(scores, keep)
    found = ops.global_topk(scores, keep[:3], ranks=keep[3:])
    assert_same(found, (masks[:3], thresholds))
    assert_same(ops.global_topk(scores, [], ranks=keep), ([], thresholds))
    sorted_ = torch.cat([s.flatten() for s in scores]).sort(descending=True).values
    levels = [float(sorted_[k - 1]) if k else float("inf") for k in keep]
    assert thresholds.tolist() == levels


@pytest.mark.parametrize("name", ["gaussian", "few_distinct", "late_ties", "extremes"])
def test_does_not_depend_on_threads(name, threads):
    arrays, keep = topk_cases.case(name, 300_007)
    scores = tensors_of(arrays)
    expected = reference.global_topk(scores, keep)
    for count in (1, 2, 3):
        threads(count)
        assert_same(ops.global_topk(scores, keep), expected)


def test_all_that_the_sample_sees_may_be_wrong():
    """Of the largest entries many sit where few samples are: in a few stretches."""
    values = torch.rand(400_000)
    values[1000:1030] += 5
    values[-40:] = 5
    for k in (1, 29, 30, 31, 60, 69, 70, 71):
        found = ops.global_topk([values], [k])
        assert_same(found, reference.global_topk([values], [k]))


def test_many_equal_entries_beside_the_threshold():
    """Half of all entries equal, and k just at either border of them."""
    values = torch.rand(300_000)
    values[torch.rand(300_000) < 0.5] = 0.25
    above, least = int((values > 0.25).sum()), int((values >= 0.25).sum())
    keep = [above - 1, above, above + 1, least - 1, least, least + 1]
    assert_same(ops.global_topk([values], keep), reference.global_topk([values], keep))


@pytest.mark.parametrize("flush", [True, False])
def test_denormals_count_even_where_arithmetic_flushes_them(flush):
    scores = tensors_of(topk_cases.case("denormals", 3_000)[0])
    expected = reference.global_topk(scores, [1000])
    try:
        torch.set_flush_denormal(flush)
        found = ops.global_topk(scores, [1000])
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected)


def test_non_contiguous_scores():
    x = torch.randn(40, 30, 4)
    scores = [x.permute(2, 0, 1), x[::3, ::2], torch.randn(7, 1).expand(7, 9), x[0, 0]]
    keep = [0, 1, 100, 5000]
    assert_same(ops.global_topk(scores, keep), reference.global_topk(scores, keep))


def test_scalars_empty_tensors_and_no_k():
    scores = [torch.tensor(2.0), torch.empty(0, 3), torch.tensor([1.0, 3.0])]
    assert_same(ops.global_topk(scores, [2]), reference.global_topk(scores, [2]))
    masks, thresholds = ops.global_topk(scores, [])
    assert masks == [] and thresholds.shape == (0,)
    masks, thresholds = ops.global_topk([torch.empty(0)], [0])
    assert masks[0][0].shape == (0,) and thresholds.tolist() == [float("inf")]
    masks, thresholds = ops.global_topk([torch.empty(0)] * 2, [], ranks=[0, 0])
    assert masks == [] and thresholds.tolist() == [float("inf")] * 2


@pytest.mark.parametrize("n", [5, 100_000])
@pytest.mark.parametrize("ranks", [[], [0], [2, 0]])
@pytest.mark.parametrize("keep", [[], [0], [3], [1, 2, 4]])
def test_nonfinite_entries_are_counted_per_tensor(n, keep, ranks):
    bad = [float("nan"), float("inf"), -float("inf"), -float("nan")]
    scores = [torch.randn(n) for _ in range(4)]
    for i, count in enumerate([0, 1, n // 2, n]):
        places = torch.randperm(n)[:count]
        scores[i][places] = torch.tensor(bad)[torch.randint(4, (count,))]
    nonfinite = torch.ops.fisherprune.global_topk(scores, keep, ranks)[2]
    assert nonfinite.tolist() == [0, 1, n // 2, n]
    message = rf"scores\[1\] must be finite, 1 of {n} entries are NaN or infinite"
    with pytest.raises(FisherpruneError, match=message):
        ops.global_topk(scores, keep, ranks=ranks)


@pytest.mark.parametrize("digit_bits", [1, 8, 11, 16])
@pytest.mark.parametrize("prefix_bits", [0, 3, 16])
def test_histogram_equals_reference(prefix_bits, digit_bits):
    arrays, _ = topk_cases.case("every_bit_pattern", 50_000)
    scores = [*tensors_of(arrays), torch.tensor([0.0, -0.0])]
    for prefix in {0, 2**prefix_bits // 2, 2**prefix_bits - 1}:
        wanted = prefix, prefix_bits, digit_bits
        found = ops.topk_histogram(scores, *wanted)
        assert torch.equal(found, reference.topk_histogram(scores, *wanted))


@pytest.mark.parametrize("name", ["few_distinct", "signed_zeros", "late_ties"])
@pytest.mark.parametrize("n", [17, 100_000])
def test_masks_equal_reference(name, n):
    scores = tensors_of(topk_cases.case(name, n)[0])
    values = torch.cat([s.reshape(-1) for s in scores])
    for threshold in [values.median().item(), 0.0, -0.0, 1e30, -1e30, float("inf")]:
        for most in (0, n // 20, n):
            ties = [i % 3 * most for i in range(len(scores))]
            found = ops.topk_masks(scores, threshold, ties)
            truth = reference.topk_masks(scores, threshold, ties)
            assert all(map(torch.equal, found, truth))


def select_by_histograms(shards, k, digit_bits=8):
    """Find the k-th key over shards that never meet: their histograms are added."""
    prefix, left = 0, k
    for bits in range(0, 32, digit_bits):
        count = sum(ops.topk_histogram(s, prefix, bits, digit_bits) for s in shards)
        at_least = count.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= left).nonzero().max())
        left -= int(at_least[digit] - count[digit])
        prefix = prefix << digit_bits | digit
    bits = prefix ^ 0x80000000 if prefix & 0x80000000 else -prefix & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32)), left


@pytest.mark.parametrize("name", ["gaussian", "few_distinct", "zeros_and_tiny"])
def test_histograms_and_masks_of_shards_compose_to_global_topk(name):
    scores = tensors_of(topk_cases.case(name, 20_000)[0])
    half = len(scores) // 2
    shards = [scores[:half], scores[half:]]
    for k in (1, 2_000, 19_999):
        threshold, left = select_by_histograms(shards, k)
        masks = []
        for shard in shards:
            ties = []
            for s in shard:
                ties.append(min(left, int((s == threshold).sum())))
                left -= ties[-1]
            masks += ops.topk_masks(shard, threshold, ties)
        found = [masks], torch.tensor([threshold])
        assert_same(found, ops.global_topk(scores, [k]))


def test_opcheck():
    scores = [torch.randn(5, 3), torch.randn(0), torch.randn(8, 2).T]
    op = torch.ops.fisherprune
    opcheck(op.global_topk, (scores, [0, 4, 31]))
    opcheck(op.global_topk, (scores, [4], [0, 31]))
    opcheck(op.global_topk, (scores, [], [5]))
    opcheck(op.topk_histogram, (scores, 1, 1, 8))
    opcheck(op.topk_masks, (scores, 0.5, [1, 0, 2]))


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.global_topk([X, X.double()], [1]),
         "global_topk: scores[1] must be float32, got Double"),
        (lambda: ops.global_topk([X], [-1]),
         "global_topk: keep must lie in [0, 4], got -1"),
        (lambda: ops.global_topk([X, X], [1, 9]),
         "global_topk: keep must lie in [0, 8], got 9"),
        (lambda: ops.global_topk([X], [1], ranks=[2, -1]),
         "global_topk: ranks must lie in [0, 4], got -1"),
        (lambda: ops.global_topk([X, X], [1], ranks=[9]),
         "global_topk: ranks must lie in [0, 8], got 9"),
        (lambda: ops.global_topk([], [1]),
         "global_topk: scores must hold at least one tensor"),
        (lambda: ops.global_topk([X, X.to("meta")], [1]),
         "global_topk: scores[1] must be on cpu like scores[0], got meta"),
        (lambda: ops.topk_histogram([X, X.to("meta")], 0, 0, 8),
         "topk_histogram: scores[1] must be on cpu like scores[0], got meta"),
        (lambda: ops.topk_masks([X.to("meta"), X], 0.0, [0, 0]),
         "topk_masks: scores[1] must be on meta like scores[0], got cpu"),
        (lambda: ops.topk_histogram([], 0, 0, 8),
         "topk_histogram: scores must hold at least one tensor"),
        (lambda: ops.topk_masks([], 0.0, []),
         "topk_masks: scores must hold at least one tensor"),
        (lambda: ops.topk_histogram([X.int()], 0, 0, 8),
         "topk_histogram: scores[0] must be float32, got Int"),
        (lambda: ops.topk_histogram([X], 0, 0, 0),
         "topk_histogram: digit_bits must lie in [1, 16], got 0"),
        (lambda: ops.topk_histogram([X], 0, 0, 17),
         "topk_histogram: digit_bits must lie in [1, 16], got 17"),
        (lambda: ops.topk_histogram([X], 0, -1, 8),
         "topk_histogram: prefix_bits must lie in [0, 24], got -1"),
        (lambda: ops.topk_histogram([X], 0, 25, 8),
         "topk_histogram: prefix_bits must lie in [0, 24], got 25"),
        (lambda: ops.topk_histogram([X], 4, 2, 8),
         "topk_histogram: prefix must lie in [0, 4), got 4"),
        (lambda: ops.topk_histogram([X], -1, 2, 8),
         "topk_histogram: prefix must lie in [0, 4), got -1"),
        (lambda: ops.topk_masks([X.half()], 0.0, [0]),
         "topk_masks: scores[0] must be float32, got Half"),
        (lambda: ops.topk_masks([X, X], 0.0, [0]),
         "topk_masks: ties must have one entry per score tensor, 2, got 1"),
        (lambda: ops.topk_masks([X], 0.0, [-1]),
         "topk_masks: ties must be at least 0, got -1"),
        (lambda: ops.topk_masks([X], float("nan"), [0]),
         "topk_masks: threshold must be a number, got NaN"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


def assert_selects_alike():
    for n in (5, 1000, 70_001, 300_000):
        scores = [torch.randn(n), torch.randn(n).round(decimals=1)]
        keep, ranks = [1, n // 3, n, 2 * n], [2, n // 2]
        masks, thresholds = ops.global_topk(scores, keep, ranks=ranks)
        wanted = reference.global_topk(scores, keep, ranks=ranks)
        assert torch.equal(thresholds, wanted[1])
        for a, b in zip(masks, wanted[0], strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_selects_alike(capability):
    run_with(capability, __file__, "assert_selects_alike()")
