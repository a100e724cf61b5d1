"""row_moments on the CPU: against float64, its bits and its errors."""

import pytest
import torch
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fisherprune import ops
from fisherprune.ops import reference

CASES = [
    ((32, 128), 1),
    ((33, 1541), 1),
    ((7, 3), 1),
    ((1, 513), 1),
    ((12, 517), 3),
    ((20, 9), 4),
    ((10, 1030), 10),
    ((45, 1), 5),
    ((0, 5), 1),
    ((4, 0), 2),
]


def assert_right(rows, group_size):
    found = ops.row_moments(rows, group_size)
    wanted = reference.row_moments(rows.double(), group_size)
    means = rows.double().unflatten(0, (-1, group_size)).abs().mean(1)
    for got, want, size in zip(
        found, wanted, (means.sum(0), means.square().sum(0)), strict=True
    ):
        assert got.shape == want.shape and got.dtype == torch.float32
        assert ((got - want).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("shape, group_size", CASES, ids=str)
def test_equals_float64(shape, group_size):
    assert_right(torch.randn(shape), group_size)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 9),
    group_size=st.integers(1, 9),
    size=st.integers(1, 40),
    beside=st.integers(0, 5),
)
def test_any_shape_equals_float64(groups, group_size, size, beside):
    rows = torch.randn(groups * group_size, size + beside)
    assert_right(rows[:, beside:], group_size)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_equals_float64(capability):
    run_with(capability, __file__, "for case in CASES: test_equals_float64(*case)")


@pytest.mark.parametrize("group_size", [1, 3])
def test_threads_and_what_lies_beside_do_not_change_a_bit(group_size):
    rows, before = torch.randn(21, 5000), torch.get_num_threads()
    found = ops.row_moments(rows, group_size)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = ops.row_moments(rows, group_size)
            assert all(map(torch.equal, found, again))
    finally:
        torch.set_num_threads(before)
    for start in range(4900, 5000):
        part = slice(start, min(start + 1 + start % 13, 5000))
        own = ops.row_moments(rows[:, part], group_size)
        assert all(
            torch.equal(one[part], part_) for one, part_ in zip(found, own, strict=True)
        )


def test_what_is_no_number_stays_in_its_column():
    rows = torch.randn(9, 40)
    rows[3, 7], rows[8, 39] = float("nan"), float("inf")
    sum, sum_sq = ops.row_moments(rows)
    for each in (sum, sum_sq):
        assert (~each.isfinite()).nonzero().flatten().tolist() == [7, 39]


@pytest.mark.parametrize("group_size", [1, 4])
def test_opcheck(group_size):
    given = torch.randn(8, 19), group_size
    opcheck(torch.ops.fisherprune.row_moments, given)


def test_bad_operands_are_refused():
    rows = torch.randn(6, 5)
    cases = [
        ((rows.double(), 1), r"rows must be float32 \[N, P\], got Double \[6, 5\]"),
        ((rows[0], 1), r"rows must be float32 \[N, P\], got Float \[5\]"),
        ((rows.mT, 1), "the entries of a row must lie side by side, got the stride 5"),
        ((rows, 4), "group_size must divide the number of rows, 6, got 4"),
        ((rows, 0), "group_size must divide the number of rows, 6, got 0"),
    ]
    for wrong, text in cases:
        with pytest.raises(RuntimeError, match=f"row_moments: {text}"):
            ops.row_moments(*wrong)
