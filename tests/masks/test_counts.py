"""How many weights are kept."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import scores_of

import fisherprune as fp
from fisherprune.masks.counts import checked_sparsity, keep_count
from fisherprune.masks.plan import Plan
from fisherprune.masks.scopes.registry import SCOPES


@pytest.mark.parametrize(
    ("n", "sparsity", "expected"),
    [
        (10, 0.9, 1),  # 0.09999999999999998 of 10 in floating point
        (100, 0.29, 71),
        (1000, 0.999, 1),
        (11_164_352, 0.98, 223_287),
        (5, 0.0, 5),
        (5, 1.0, 1),
        (5, 1, 1),
        (3, 0.9, 1),
        (0, 0.5, 0),
        (10**12 + 1, 0.1, 900_000_000_000),
        (7, np.float64(0.5), 3),
    ],
)
def test_keep_count(n, sparsity, expected):
    assert keep_count(n, sparsity) == expected


@settings(deadline=None)
@given(st.integers(1, 10**10), st.decimals(0, 1, places=4))
def test_keep_count_is_exact_for_decimals(n, sparsity):
    exact = math.floor((1 - Fraction(sparsity)) * n)
    assert keep_count(n, float(sparsity)) == max(1, exact)


@settings(deadline=None)
@given(st.integers(2, 10**9), st.data())
def test_a_sparsity_that_was_computed_means_its_fraction(n, data):
    k = data.draw(st.integers(0, n))
    removed = n - k
    for sparsity in (
        removed / n,
        1 - k / n,
        1.0 - (1.0 - removed / n),
        0.5 + (removed / n - 0.5),
        float(Fraction(removed, n)),
        np.linspace(0, 1, n + 1)[removed] if n < 1000 else removed / n,
        math.nextafter(removed / n, 1) if removed < n else 1.0,
    ):
        assert keep_count(n, sparsity) == max(1, k)


def test_a_sparsity_of_one_third_rounding_error():
    assert keep_count(10, 1 - 0.7) == 7
    assert keep_count(10, 0.1 + 0.2) == 7
    assert keep_count(1000, 1 - 0.001) == 1
    assert keep_count(3, 1 / 3) == 2 and keep_count(3, 1 - 1 / 3) == 1
    assert keep_count(10, sum([0.1] * 3)) == 7
    assert keep_count(100, checked_sparsity(np.float32(0.98))) == 2
    assert keep_count(10, 0.3 + 1e-14) == 6  # more than rounding


@pytest.mark.parametrize("n", [10, 999, 269_722, 11_164_352, 400_000_001])
def test_decimal_sparsities_keep_what_they_did(n):
    for digits in range(1, 7):
        for tenth in (1, 3, 5, 7, 9, 98, 99, 999, 9999, 123457):
            decimal = Fraction(tenth % 10**digits, 10**digits)
            wanted = max(1, math.floor((1 - decimal) * n))
            assert keep_count(n, float(decimal)) == wanted


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.55, 0.9])
def test_counts_are_those_of_the_masks(scope, sparsity):
    scores = scores_of((5, 1, 3, 1), (20, 3, 3, 3), (7,), (0,), (30, 11))
    given = {"densities": dict.fromkeys(scores, 0.5)} if scope == "densities" else {}
    shapes = {name: s.shape for name, s in scores.items()}
    counts = Plan(shapes, scope, **given).counts(sparsity)
    masks = fp.select_masks(scores, sparsity, scope, **given)
    if scope == "global":
        assert counts == masks.kept()
    else:
        assert counts == {name: int(mask.sum()) for name, mask in masks.items()}


def test_a_plan_refuses_what_the_selection_would():
    shapes = {"a": (4,), "b": (6,)}
    for options, match in [
        ({"sparsity": 1.5}, "sparsity must be a number in"),
        ({"scope": "channel"}, "scope must be one of"),
        ({"scope": "densities"}, "densities must be given"),
        ({"scope": "densities", "densities": {"a": 1}}, "they lack 'b'"),
        ({"scope": "densities", "densities": {"a": 1, "b": 0}}, "at most 4 weights"),
        ({"shapes": {"a": (0, 3)}}, "at least one entry"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=match):
            options = {"shapes": shapes, "sparsity": 0.2} | options
            sparsity = options.pop("sparsity")
            Plan(**options).counts(sparsity)
