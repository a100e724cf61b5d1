"""Plans: selections among weights, and rounds of them."""

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import scores_of
from pattern_truth import n_of_m

import fisherprune as fp
from fisherprune.masks.counts import keep_count
from fisherprune.masks.devices import select_over_devices
from fisherprune.masks.plan import Plan
from fisherprune.masks.scopes.registry import SCOPES

SHAPES = (6, 1, 3, 3), (20, 6, 3, 3), (0, 4), (9,), (30, 11)
WEIGHTS = 54 + 1080 + 9 + 330


def plan_of(scores, scope, **options):
    if scope == "densities":
        options["densities"] = {n: 0.3 + i for i, n in enumerate(scores)}
    return Plan({n: s.shape for n, s in scores.items()}, scope, **options)


def few_scores():
    return {"a": torch.rand(12), "b": torch.rand(12), "c": torch.rand(4)}


def within(masks, among):
    return all(not (masks[n] & ~among[n]).any() for n in masks)


def largest_among(scores, among, keep):
    """Keep the largest of some entries: the others are sorted behind all of them."""
    lowest = min(float(s.min()) for s in scores.values() if s.numel()) - 1
    inside = {n: s.where(among[n], lowest) for n, s in scores.items()}
    return truth.keep_largest(inside, keep)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.integers(1, 9),
    st.fractions(0, 1),
    st.fractions(0, 1),
    st.integers(0, 2**31),
)
def test_only_weights_of_among_are_kept(sizes, values, density, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        str(i): torch.randint(-values, values, (n,), generator=generator) / 4
        for i, n in enumerate([*sizes, 30])
    }
    among = {
        n: torch.rand(s.shape, generator=generator) < float(density)
        for n, s in scores.items()
    }
    room, total = sum(int(m.sum()) for m in among.values()), sum(sizes) + 30
    keep = max(1, int(share * room))
    plan = plan_of(scores, "global")
    if keep > room:
        with pytest.raises(fp.FisherpruneError, match="among must leave 1 scores to"):
            plan.select(scores, 1 - keep / total, "position", among)
        return
    for worst in (-3e38, -0.0, 3e38):  # what is outside does not count
        given = {n: s.where(among[n], worst) for n, s in scores.items()}
        masks = plan.select(given, 1 - keep / total, "position", among)
        wanted = largest_among(scores, among, keep)
        assert all(torch.equal(masks[n], wanted[n]) for n in scores)
    inside = {n: s.where(among[n], -torch.inf) for n, s in scores.items()}
    kept_of = {n: int(m.sum()) for n, m in among.items()}
    found = select_over_devices(inside, keep, "position", kept_of)
    assert all(torch.equal(found[n], wanted[n]) for n in scores)


@pytest.mark.parametrize("scope", SCOPES)
def test_all_scores_may_be_the_lowest_of_float32(scope):
    lowest = torch.finfo(torch.float32).min
    scores = {"stem": torch.full((4,), lowest), "wide": torch.full((30,), lowest)}
    among = {"stem": torch.ones(4) > 0, "wide": torch.arange(30) % 2 == 1}
    plan = plan_of(scores, scope)
    masks = plan.select(scores, 0.7, "position", among)
    assert within(masks, among) and masks.kept() == keep_count(34, 0.7)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("least", [0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_rounds_prune_what_is_left(scope, least, seed):
    """With new scores in every round, no weight comes back and totals are exact."""
    scores = scores_of(*SHAPES)
    plan = plan_of(scores, scope, min_per_layer=least)
    masks, sparsities = None, [0.0, 0.13, 0.31, 0.5, 0.51, 0.512, 0.8, 0.9, 0.94]
    for sparsity in sparsities:
        scores = scores_of(*SHAPES)
        before, masks = masks, plan.select(scores, sparsity, among=masks)
        counts, total = plan.counts(sparsity), masks.kept()
        if scope == "global":
            assert total == counts
        else:
            assert total == sum(counts.values())
            for name, mask in masks.items():
                assert abs(int(mask.sum()) - counts[name]) <= 1
        if before is not None:
            assert within(masks, before)
        for mask in masks.values():
            assert int(mask.sum()) >= min(least, mask.numel())


def test_a_count_that_rounding_would_raise_stays():
    """Largest remainders give the smallest layer 1 of 11 weights, but 2 of 10."""
    plan = Plan(
        {"a": (12,), "b": (12,), "c": (4,)},
        "densities",
        densities=dict.fromkeys("abc", 1),
    )
    assert plan.counts(1 - 11 / 28) == {"a": 5, "b": 5, "c": 1}
    assert plan.counts(1 - 10 / 28) == {"a": 4, "b": 4, "c": 2}
    first = plan.select(few_scores(), 1 - 11 / 28)
    then = plan.select(few_scores(), 1 - 10 / 28, among=first)
    assert within(then, first)
    assert [int(mask.sum()) for mask in then.values()] == [5, 4, 1]


@pytest.mark.parametrize("structure", ["channels", "blocks:3x4"])
@pytest.mark.parametrize("scope", SCOPES)
def test_rounds_of_units(structure, scope):
    scores = scores_of(*SHAPES)
    plan = plan_of(scores, scope, structure=structure, min_per_layer=1)
    masks = None
    for sparsity in (0.0, 0.3, 0.31, 0.6, 0.8):
        before = masks
        masks = plan.select(scores_of(*SHAPES), sparsity, "position", masks)
        counts = plan.counts(sparsity)
        most = counts if scope == "global" else sum(counts.values())
        assert masks.kept() <= most or scope == "layer"
        assert before is None or within(masks, before)
        assert all(mask.any() or not mask.numel() for mask in masks.values())


def test_groups_among_weights():
    scores = scores_of((8, 8), (4, 6, 3, 3))
    plan = plan_of(scores, "global", structure="2:4")
    among = {n: torch.rand(s.shape) < 0.3 for n, s in scores.items()}
    masks = plan.select(scores, 0.5, among=among)
    wanted = n_of_m(scores, 2, 4, among=among)
    assert all(torch.equal(masks[n], wanted[n]) for n in scores)


def test_weights_outside_are_no_ties():
    scores = {"a": torch.cat([torch.randn(300), torch.zeros(300)])}
    among = {"a": scores["a"] != 0}
    plan = plan_of(scores, "global")
    assert within(plan.select(scores, 0.75, among=among), among)
    assert within(plan.select(scores, [0.6, 0.9], among=among)[0], among)
    scores["a"][:300] = 1.0
    match = "300 equal scores of 1 compete for 150 places"
    with pytest.raises(fp.FisherpruneError, match=match):
        plan.select(scores, 0.75, among=among)
    inside = {"a": scores["a"].where(among["a"], -torch.inf)}
    with pytest.raises(fp.FisherpruneError, match=match):
        select_over_devices(inside, 150, "error", {"a": 300})


def test_a_few_equal_weights_decide_nothing():
    scores = {"a": torch.ones(100)}
    among = {"a": torch.arange(100) < 5}
    match = "5 equal scores of 1 compete for 3 places"
    with pytest.raises(fp.FisherpruneError, match=match):
        plan_of(scores, "global").select(scores, 0.97, among=among)
    inside = {"a": scores["a"].where(among["a"], -torch.inf)}
    with pytest.raises(fp.FisherpruneError, match=match):
        select_over_devices(inside, 3, "error", {"a": 5})


@pytest.mark.parametrize("structure", ["weights", "channels"])
def test_scores_of_among_that_are_not_finite(structure):
    scores = scores_of((6, 4), (3, 3))
    among = {n: torch.rand(s.shape) < 0.5 for n, s in scores.items()}
    among["layer1"][1, 2] = True
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores["layer1"][1, 2] = bad
        plan = plan_of(scores, "global", structure=structure)
        match = "'layer1'.* must be finite, 1 of 9 entries are NaN or infinite"
        with pytest.raises(fp.FisherpruneError, match=match):
            plan.select(scores, 0.9, among=among)


def test_among_that_does_not_fit():
    scores = scores_of((4,), (6, 5))
    plan = plan_of(scores, "layer")
    full = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
    few = full | {"layer0": torch.arange(4) < 2}
    match = "among must leave 3 scores of 'layer0' to keep, got 2"
    with pytest.raises(fp.FisherpruneError, match=match):
        plan.select(scores, 0.25, among=few)
    for among, match in [
        (
            {"layer0": full["layer0"]},
            "among must be of the parameters .*, got 'layer1'",
        ),
        (full | {"x": full["layer0"]}, "among must be of the parameters .*, got 'x'"),
        (
            full | {"layer1": full["layer0"]},
            r"among of 'layer1' must be of shape .6, 5",
        ),
        (scores, "among: mask of 'layer0' must be a bool tensor, got torch.float32"),
        ([full], "among: masks must map parameter names to bool tensors"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=f"select_masks: {match}"):
            plan.select(scores, 0.25, among=among)
    wrapped = {f"module.{name}": mask for name, mask in full.items()}
    assert plan.select(scores, 0.25, among=wrapped) == plan.select(scores, 0.25)


def test_scores_of_other_parameters():
    plan = Plan({"a": (4,), "b": (2, 3)})
    scores = {"a": torch.rand(4), "b": torch.rand(2, 3)}
    for wrong, match in [
        (
            {"a": scores["a"]},
            "must be of the parameters that are pruned, got 'b'",
        ),
        (scores | {"c": scores["a"]}, "must be of the parameters .*, got 'c'"),
        (
            scores | {"b": torch.rand(3, 2)},
            r"of 'b' must be of shape .2, 3., got .3, 2.",
        ),
    ]:
        with pytest.raises(fp.FisherpruneError, match=f"select_masks: scores.*{match}"):
            plan.select(wrong, 0.5)
    turned = {name: scores[name] for name in ("b", "a")}  # the order is the plan's
    assert list(plan.select(turned, 0.5)) == ["a", "b"]


def test_selecting_among_reads_the_host_twice(monkeypatch):
    """On a GPU every reading waits for the device: the counts, then the result."""
    read = []

    def reading(name, real):
        return lambda tensor, *args: read.append(name) or real(tensor, *args)

    scores = scores_of((20, 3), (7,), (0,), (30, 11))
    among = {n: torch.rand(s.shape) < 0.9 for n, s in scores.items()}
    for name in ("tolist", "item", "cpu", "__int__", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, reading(name, real))
    plan_of(scores, "global").select(scores, [0.5, 0.8], among=among)
    assert read == ["tolist", "tolist"]
