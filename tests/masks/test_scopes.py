"""Scopes: where scores compete, and how many weights each layer keeps."""

from fractions import Fraction

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import scores_of
from pattern_truth import clamped_shares, keep_units

import fisherprune as fp
from fisherprune.masks.counts import keep_count
from fisherprune.masks.densities import erk_densities, keep_counts
from fisherprune.masks.plan import Plan
from fisherprune.masks.scopes.registry import SCOPES

SHAPES = (6, 1, 3, 3), (20, 6, 3, 3), (0, 4), (9,), (30, 11)
WEIGHTS = 54 + 1080 + 9 + 330


def given_for(scope, names):
    """Return the densities that a scope needs."""
    return {"densities": dict.fromkeys(names, 0.5)} if scope == "densities" else {}


@pytest.mark.parametrize("scope", ["erk_plus", "uniform_plus"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.96])
def test_the_first_layer_is_dense_and_the_others_share_the_rest(scope, sparsity):
    scores = scores_of((0, 2), *SHAPES)  # an empty one is no first layer
    masks = fp.select_masks(scores, sparsity, scope)
    keep = keep_count(WEIGHTS, sparsity)
    assert masks.kept() == keep and masks["layer1"].all()
    rest = {n: s for n, s in scores.items() if n not in ("layer0", "layer1")}
    shapes = {name: s.shape for name, s in rest.items()}
    density = erk_densities(shapes) if scope == "erk_plus" else dict.fromkeys(rest, 1)
    sizes = {name: s.numel() for name, s in rest.items()}
    counts = keep_counts(density, sizes, keep - 54)
    for name, s in rest.items():
        wanted = truth.keep_largest({name: s}, counts[name])[name]
        assert torch.equal(masks[name], wanted)
        if scope == "uniform_plus":
            exact = Fraction(keep - 54, WEIGHTS - 54) * s.numel()
            assert abs(int(masks[name].sum()) - exact) < 1


@pytest.mark.parametrize("scope", ["erk_plus", "uniform_plus"])
def test_a_first_layer_that_is_too_large(scope):
    plan = Plan({"stem": (6, 3), "next": (9, 9)}, scope)
    assert plan.counts(0.81) == {"stem": 18, "next": 0}
    match = f"scope {scope} keeps all 18 weights .* 'stem', but the sparsity leaves 17"
    with pytest.raises(fp.FisherpruneError, match=match):
        plan.counts(0.82)
    with pytest.raises(fp.FisherpruneError, match="keeps all 4 weights of the first"):
        Plan({"only": (4,)}, scope).counts(0.5)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 60), st.sampled_from([0, 0.1, 1, 3]), st.integers(0, 70)
        ),
        min_size=1,
        max_size=6,
    ),
    st.fractions(0, 1),
)
def test_counts_are_proportional_between_a_floor_and_dense(layers, share):
    sizes, densities, least = zip(*layers, strict=True)
    low = [min(pair) for pair in zip(least, sizes, strict=True)]
    weights = [Fraction(d) * n for n, d in zip(sizes, densities, strict=True)]
    high = [n if w else lo for n, w, lo in zip(sizes, weights, low, strict=True)]
    keep = sum(low) + int(share * (sum(high) - sum(low)))
    names = [str(i) for i in range(len(layers))]
    named = [dict(zip(names, v, strict=True)) for v in (densities, sizes, low)]
    counts = list(keep_counts(named[0], named[1], keep, named[2]).values())
    assert sum(counts) == keep
    exact = clamped_shares(weights, low, high, keep)
    assert sum(exact) == keep
    for count, e, lo, hi in zip(counts, exact, low, high, strict=True):
        assert abs(count - e) < 1 and lo <= count <= hi


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.fractions(0, 1),
    st.integers(0, 2**31),
)
def test_a_floor_under_the_global_scope(sizes, least, values, share, seed):
    """Each layer keeps its own best ones first; the rest compete."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"layer{i}": torch.randint(-values, values, (n,), generator=generator) / 4
        for i, n in enumerate(sizes)
    }
    scores["wide"] = torch.randn(40, generator=generator)
    low = sum(min(n, least) for n in (*sizes, 40))
    keep = low + int(share * (sum(sizes) + 40 - low))
    sparsity = 1 - keep / (sum(sizes) + 40)
    masks = fp.select_masks(scores, sparsity, min_per_layer=least, ties="position")
    wanted = keep_units(scores, "weights", keep, least)
    assert masks.kept() == keep
    assert all(torch.equal(masks[name], wanted[name]) for name in scores)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_floor_keeps_layers_and_the_total(scope):
    scores = scores_of(*SHAPES)
    scores["layer4"] -= 100  # would collapse
    options = given_for(scope, scores)
    sparsities = [0.3, 0.8, 0.9]
    before = fp.select_masks(scores, sparsities, scope, **options)
    found = fp.select_masks(scores, sparsities, scope, min_per_layer=8, **options)
    for old, masks, sparsity in zip(before, found, sparsities, strict=True):
        assert old.kept() == masks.kept()
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        assert all(n >= min(8, scores[name].numel()) for name, n in kept.items())
        counts = Plan(
            {n: s.shape for n, s in scores.items()}, scope, min_per_layer=8, **options
        ).counts(sparsity)
        assert counts == (masks.kept() if scope == "global" else kept)
        for name, s in scores.items():
            wanted = truth.keep_largest({name: s}, kept[name])[name]
            assert torch.equal(masks[name], wanted)
    if scope == "global":
        assert not before[1]["layer4"].any() and int(found[1]["layer4"].sum()) == 8


@pytest.mark.parametrize("scope", SCOPES)
def test_a_floor_that_binds_nowhere_changes_nothing(scope):
    scores = scores_of((9, 2), (40, 30), (50, 30))
    options = given_for(scope, scores)
    plain = fp.select_masks(scores, [0.5, 0.7], scope, **options)
    assert plain == fp.select_masks(
        scores, [0.5, 0.7], scope, min_per_layer=1, **options
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_floors_that_are_too_high(scope):
    scores = scores_of((2,), (20,), (30,))
    options = given_for(scope, scores)
    assert fp.select_masks(scores, 0.5, scope, min_per_layer=12, **options).kept() == 26
    match = "min_per_layer: the layers must keep .* together, but the sparsity leaves"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.select_masks(scores, 0.5, scope, min_per_layer=13, **options)
    for bad in (-1, 1.0, True, "1", None):
        match = "min_per_layer must be an integer of at least 0, got"
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.select_masks(scores, 0.5, scope, min_per_layer=bad, **options)


def test_ties_below_a_floor_are_refused_where_they_decide():
    scores = {"a": torch.rand(500) + 1, "b": torch.zeros(100)}
    match = "100 equal scores of 0 compete for 3 places, most of them in 'b'"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.select_masks(scores, 0.9, min_per_layer=3)
    masks = fp.select_masks(scores, 0.9, min_per_layer=3, ties="position")
    assert masks["b"].nonzero().flatten().tolist() == [0, 1, 2]
    scores["a"][7] = float("nan")
    with pytest.raises(fp.FisherpruneError, match="'a'.* must be finite, 1 of 500"):
        fp.select_masks(scores, 0.9, min_per_layer=3)
