"""Densities by layer, and the counts that come of them."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherprune as fp
from fisherprune.masks.densities import (
    checked_densities,
    erk_densities,
    keep_counts,
    read_densities,
)

LAYERS = st.lists(
    st.tuples(st.integers(0, 10**6), st.floats(0, 1e3, allow_subnormal=False)),
    min_size=1,
    max_size=6,
)


def named(values):
    return {f"layer{i}": value for i, value in enumerate(values)}


def counts_of(layers, keep):
    sizes, densities = zip(*layers, strict=True)
    return list(keep_counts(named(densities), named(sizes), keep).values())


def exact_shares(layers, keep):
    """Scale by a common factor, found by trying every set of dense layers."""
    open_ = [i for i, (n, r) in enumerate(layers) if n and r > 0]
    by_density = sorted(open_, key=lambda i: -layers[i][1])
    for dense in range(len(open_) + 1):
        full, rest = by_density[:dense], by_density[dense:]
        left = keep - sum(layers[i][0] for i in full)
        weight = sum(layers[i][0] * Fraction(layers[i][1]) for i in rest)
        factor = Fraction(left) / weight if rest else Fraction(0)
        if left >= 0 and all(factor * Fraction(layers[i][1]) <= 1 for i in rest):
            shares = [Fraction(0)] * len(layers)
            for i in full:
                shares[i] = Fraction(layers[i][0])
            for i in rest:
                shares[i] = factor * Fraction(layers[i][1]) * layers[i][0]
            return shares
    raise AssertionError("no set of dense layers fits")


@settings(deadline=None)
@given(LAYERS, st.fractions(0, 1))
def test_counts_sum_exactly_and_are_proportional_up_to_dense(layers, share):
    most = sum(n for n, r in layers if r > 0)
    keep = int(share * most)
    counts = counts_of(layers, keep)
    assert sum(counts) == keep
    for (n, _), count, exact in zip(
        layers, counts, exact_shares(layers, keep), strict=True
    ):
        assert 0 <= count <= n and abs(count - exact) < 1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4),
    st.fractions(0, 1),
)
def test_no_other_counts_are_closer(layers, share):
    most = sum(n for n, r in layers if r > 0)
    keep = int(share * most)
    exact = exact_shares(layers, keep)

    def distance(counts):
        return sum(abs(c - e) for c, e in zip(counts, exact, strict=True))

    every = itertools.product(*(range(n + 1) for n, _ in layers))
    best = min(distance(c) for c in every if sum(c) == keep)
    assert distance(counts_of(layers, keep)) == best


def test_ties_of_the_remainders_go_by_order():
    assert counts_of([(10, 1.0)] * 4, 10) == [3, 3, 2, 2]


def test_layers_that_would_be_more_than_dense_are_dense():
    # 7 of 12: 1 : 10 : 100 scaled to sum 7 would give the third 6.3 of 4, and with
    # that dense, the second 2.7 of 4.
    assert counts_of([(4, 1.0), (4, 10.0), (4, 100.0)], 7) == [0, 3, 4]
    assert counts_of([(4, 1.0), (4, 10.0), (4, 100.0)], 11) == [3, 4, 4]


def test_zero_stays_zero_and_says_how_many_are_left():
    assert counts_of([(5, 0.0), (5, 1.0)], 5) == [0, 5]
    with pytest.raises(fp.FisherpruneError, match="at most 5 weights can be kept.* 6"):
        counts_of([(5, 0.0), (5, 1.0)], 6)
    with pytest.raises(fp.FisherpruneError, match="at most 0 weights"):
        counts_of([(5, 0.0)], 1)


def test_erk_is_the_sum_of_dimensions_over_their_product():
    shapes = {
        "conv": (64, 3, 3, 3),
        "linear": (10, 512),
        "vector": (7,),
        "scalar": (),
        "empty": (0, 4),
    }
    assert erk_densities(shapes) == {
        "conv": 73 / 1728,
        "linear": 522 / 5120,
        "vector": 1,
        "scalar": 1,
        "empty": 0,
    }


def test_erk_of_resnet18_keeps_small_layers_dense():
    """At 90 % the first layers of ResNet18 hit the cap, the last ones go below 10 %."""
    shapes = {
        name: p.shape
        for name, p in fp.prunable_parameters(fp.models.resnet18()).items()
    }
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    keep = sum(sizes.values()) // 10
    counts = keep_counts(erk_densities(shapes), sizes, keep)
    assert sum(counts.values()) == keep
    assert counts["conv1.weight"] == sizes["conv1.weight"]
    assert counts["layer4.1.conv2.weight"] < 0.08 * sizes["layer4.1.conv2.weight"]


@pytest.mark.parametrize(
    "value, came",
    [
        (10**400, r"10+\.\.\."),
        pytest.param(10**5000, "int too large to show", id="digits"),
        (float("inf"), "inf"),
        (-1, "-1"),
        (True, "True"),
        ("1", "'1'"),
        ("x" * 99, r"'x+\.\.\."),
    ],
)
def test_densities_are_finite_numbers(value, came):
    message = f"^densities must be finite numbers of at least 0, got {came} for 'a'$"
    with pytest.raises(fp.FisherpruneError, match=message):
        checked_densities({"a": value})


@pytest.mark.parametrize(
    "content",
    ["[" * 99999, '{"a": ' * 99999, '{"a"'],
    ids=["lists", "objects", "cut off"],
)
def test_a_file_of_densities_that_is_no_json(content, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(fp.FisherpruneError, match="file.json is no JSON: .") as caught:
        read_densities(tmp_path / "file.json")
    assert "\n" not in str(caught.value)
