"""Structures: weights that are kept or pruned together."""

import math

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import scores_of
from nets import conv_net
from pattern_truth import groups_of, keep_units, n_of_m, units_of
from torch import nn

import fisherprune as fp
from fisherprune.masks.counts import keep_count
from fisherprune.masks.plan import Plan
from fisherprune.masks.scopes.registry import SCOPES
from fisherprune.parameters import transposed_names

SHAPES = (2, 3, 2, 2), (9, 5, 1, 3), (0, 4), (7,), (3, 0), (6, 10), (5, 1, 3), ()
UNITS = "channels", "blocks:2x2", "blocks:3x4", "blocks:1x1", "blocks:999999999x2"
TRANSPOSED = "layer1", "layer3", "layer5"


def some_scores(kind):
    """Return scores of all shapes: different ones, or few numbers that tie."""
    if kind == "different":
        return scores_of(*SHAPES)
    shapes = {f"layer{i}": shape for i, shape in enumerate(SHAPES)}
    return {name: torch.randint(-1, 2, shape) / 2 for name, shape in shapes.items()}


def shapes_of(scores):
    return {name: s.shape for name, s in scores.items()}


def some_of(scores):
    """Return masks, of which some leave nothing of a layer."""
    among = {name: torch.rand(s.shape) < 0.6 for name, s in scores.items()}
    among["layer0"][:] = False
    return among


def assert_same(masks, wanted):
    for name, mask in masks.items():
        assert torch.equal(mask, wanted[name]), name
        assert mask.is_contiguous() and mask.dtype == torch.bool


@pytest.mark.parametrize("structure", UNITS)
@pytest.mark.parametrize("kind", ["different", "tied"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "among"])
def test_units_are_kept_by_their_mean_score(structure, kind, masked):
    scores = some_scores(kind)
    among = some_of(scores) if masked else None
    options = {"structure": structure, "transposed": TRANSPOSED, "ties": "position"}
    sparsities = [0.0, 0.3, 0.62, 0.9, 1.0]
    total = sum(s.numel() for s in scores.values())
    every = fp.select_masks(scores, sparsities, among=among, **options)
    for sparsity, masks in zip(sparsities, every, strict=True):
        keep = keep_count(total, sparsity)
        assert_same(masks, keep_units(scores, structure, keep, 0, TRANSPOSED, among))
        assert masks.kept() <= keep or sparsity == 1.0
    for least in (1, 5):
        masks = fp.select_masks(
            scores, 0.4, among=among, min_per_layer=least, **options
        )
        keep = keep_count(total, 0.4)
        wanted = keep_units(scores, structure, keep, least, TRANSPOSED, among)
        assert_same(masks, wanted)
        for name, mask in masks.items():
            most = int(among[name].sum()) if masked else mask.numel()
            assert int(mask.sum()) >= min(least, most)


@pytest.mark.parametrize("structure", UNITS)
@pytest.mark.parametrize("scope", [s for s in SCOPES if s != "global"])
def test_units_within_the_counts_of_layers(structure, scope):
    scores = some_scores("different")
    given = {"densities": dict.fromkeys(scores, 1)} if scope == "densities" else {}
    options = {"structure": structure, "transposed": TRANSPOSED, **given}
    for sparsity in (0.2, 0.6):
        plain = Plan(shapes_of(scores), scope, **given).counts(sparsity)
        counts = Plan(shapes_of(scores), scope, **options).counts(sparsity)
        assert plain == counts
        if scope == "layer":  # at least a unit of each
            for name, s in scores.items():
                if s.numel():
                    units = units_of(structure, s.shape, name in TRANSPOSED)
                    flat = s.flatten().double()
                    best = max(units, key=lambda flats: float(flat[flats].mean()))
                    counts[name] = max(counts[name], len(best))
        masks = fp.select_masks(scores, sparsity, scope, **options)
        assert_same(masks, keep_units(scores, structure, counts, 0, TRANSPOSED))
        floors = fp.select_masks(
            scores, sparsity, scope, min_per_layer=2, ties="position", **options
        )
        for name, mask in floors.items():
            assert int(mask.sum()) >= min(2, mask.numel()), name


@pytest.mark.parametrize("structure", ["channels", "blocks:4x4"])
def test_at_least_one_unit_is_kept(structure):
    scores = scores_of((8, 16), (4, 4, 2))
    for scope in SCOPES:
        if scope.endswith("_plus"):
            continue
        given = {"densities": dict.fromkeys(scores, 1)} if scope == "densities" else {}
        masks = fp.select_masks(scores, 1.0, scope, structure=structure, **given)
        kept = [int(mask.sum()) for mask in masks.values()]
        assert all(kept) if scope == "layer" else sum(map(bool, kept)) == 1
        assert masks.kept() > 1


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4), (1, 2), (3, 5), (1, 1)])
@pytest.mark.parametrize("kind", ["different", "tied"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "among"])
def test_n_of_m_consecutive_inputs(n, m, kind, masked):
    scores = some_scores(kind)
    among = some_of(scores) if masked else None
    for scope in ("global", "layer"):
        plan = Plan(
            shapes_of(scores), scope, structure=f"{n}:{m}", transposed=TRANSPOSED
        )
        sparsity = 1 - n / m
        masks = plan.select(scores, sparsity, "position", among)
        assert_same(masks, n_of_m(scores, n, m, TRANSPOSED, among))
        assert plan.select(scores, [sparsity] * 2, "position", among) == [masks] * 2
        if among is None:
            kept = {name: int(mask.sum()) for name, mask in masks.items()}
            assert plan.counts(sparsity) == kept
    if among is None and 6 % m == 0:  # no smaller group
        even = fp.select_masks(scores_of((5, 12)), 1 - n / m, structure=f"{n}:{m}")
        assert even.sparsity() == pytest.approx(1 - n / m)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 7), max_size=4),
    st.sampled_from(["2:4", "1:3", "channels", "blocks:2x3"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(shape, structure, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "a": torch.randn(shape, generator=generator),
        "b": torch.randn(4, 3, generator=generator),
    }
    swapped = ("a",) if transposed else ()
    options = {"structure": structure, "transposed": swapped, "ties": "position"}
    if ":" in structure and not structure.startswith("blocks"):
        n, m = map(int, structure.split(":"))
        masks = fp.select_masks(scores, 1 - n / m, **options)
        assert_same(masks, n_of_m(scores, n, m, swapped))
    else:
        masks = fp.select_masks(scores, 0.5, **options)
        keep = keep_count(sum(s.numel() for s in scores.values()), 0.5)
        assert_same(masks, keep_units(scores, structure, keep, 0, swapped))


def test_large_scores_have_a_mean():
    """Their sum is no float32."""
    scores = {"a": torch.tensor([[3e38, 3e38], [3.1e38, 3.1e38]])}
    masks = fp.select_masks(scores, 0.5, structure="channels")
    assert masks["a"].tolist() == [[False, False], [True, True]]


def test_half_precision_and_strides():
    scores = {"a": torch.randn(6, 8).mT.bfloat16(), "b": torch.randn(8, 4, 3, 3)}
    scores["b"] = scores["b"].to(memory_format=torch.channels_last)
    plain = {name: s.float().contiguous() for name, s in scores.items()}
    for structure in ("channels", "blocks:2x2", "2:4"):
        found = fp.select_masks(scores, 0.5, structure=structure, ties="position")
        assert found == fp.select_masks(
            plain, 0.5, structure=structure, ties="position"
        )


@pytest.mark.parametrize("criterion", sorted(set(fp.criteria()) - {"none"}))
def test_structures_combine_with_every_criterion(criterion):
    """And with prune, whose masks are those of its scores."""
    batches = [(torch.randn(6, 3, 9, 9), torch.randint(5, (6,)))]
    model = conv_net()
    scores = fp.score(model, batches, criterion)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for structure in ("2:4", "channels", "blocks:2x4"):
        for scope in ("global", "layer"):
            options = {"structure": structure, "ties": "position"}
            masks = fp.prune(model, batches, criterion, 0.5, scope, rounds=1, **options)
            assert masks == fp.select_masks(scores, 0.5, scope, **options)
            for name, mask in masks.items():
                weight = model.get_parameter(name)
                assert torch.equal(weight, before[name] * mask)
            model.load_state_dict(before, strict=False)
    options = {"min_per_layer": 9, "ties": "position", "rounds": 2}
    for scope in ("erk", "uniform_plus"):
        masks = fp.prune(model, batches, criterion, 0.5, scope, **options)
        kept = [int(mask.sum()) for mask in masks.values()]
        assert min(kept) >= 9 and masks.kept() == keep_count(masks.total(), 0.5)
        model.load_state_dict(before, strict=False)


def test_prune_knows_which_layers_are_transposed():
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 5, 2), nn.Flatten()),
        nn.Linear(5 * 36, 4),
    )
    named = fp.prunable_parameters(model)
    assert transposed_names(model, named) == {"1.weight"}
    masks = fp.prune(model, [], "magnitude", 0.5, "layer", structure="channels")
    assert masks["0.weight"].flatten(1).all(1).sum() == 3
    assert masks["1.weight"].transpose(0, 1).flatten(1).all(1).sum() == 2
    assert masks["1.weight"].transpose(0, 1).flatten(1).any(1).sum() == 2
    masks = fp.prune(model, [], "magnitude", 0.5, structure="1:2", ties="position")
    per_group = masks["1.weight"].view(3, 2, 5, 2, 2).sum(1)
    assert (per_group == 1).all()


@pytest.mark.parametrize("structure", ["2:4", "channels", "blocks:2x2"])
def test_scores_that_are_not_finite_name_the_parameter(structure):
    for bad in (math.nan, math.inf, -math.inf):
        scores = scores_of((4, 4), (3, 3))
        scores["layer1"][1, 2] = bad
        match = "'layer1'.* must be finite, 1 of 9 entries are NaN or infinite"
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.select_masks(scores, 0.5, structure=structure)


def test_ties_that_decide_are_refused():
    dead = torch.zeros(200, 8)
    scores = {"a": torch.randn(200, 8), "b": dead}
    match = "1,600 equal scores in groups of 4 compete for 800 places.* 'b' .1,600.:"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.select_masks(scores, 0.5, structure="2:4")
    match = "200 equal scores of 0 compete for .* places.* in 'b' .200.:"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.select_masks(scores, 0.5, structure="channels")
    for structure in ("2:4", "channels"):  # all of them pruned, or few ties
        scores["b"] = torch.randn(200, 8)
        scores["b"][:4] = 0
        fp.select_masks(scores, 0.5, structure=structure)
    alone = {"b": torch.ones(2, 4)}
    with pytest.raises(fp.FisherpruneError, match="8 equal scores in groups of 4"):
        fp.select_masks(alone, 0.5, structure="2:4")
    alone["b"][0, 0] = 2
    fp.select_masks(alone, 0.5, structure="2:4")


@pytest.mark.parametrize(
    ("structure", "match"),
    [
        ("3:2", "structure must be N:M with 1 <= N <= M, got '3:2'"),
        ("0:4", "structure must be N:M with 1 <= N <= M, got '0:4'"),
        ("blocks:0x4", "structure must be blocks of at least 1x1, got 'blocks:0x4'"),
        ("block:4x4", "structure must be one of blocks:RxC.*, got 'block:4x4'"),
        ("2:4 ", "structure must be one of .*N:M.*, got '2:4 '"),
        ("2:" + "4" * 99, "structure must be one of"),
        (None, "structure must be one of .*weights, got None"),
        (["channels"], "structure must be one of"),
    ],
)
def test_bad_structures(structure, match):
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.select_masks(scores_of((4, 4)), 0.5, structure=structure)


@pytest.mark.parametrize(
    ("structure", "sparsity", "options", "match"),
    [
        ("2:4", 0.9, {}, "sparsity must be 0.5 for structure 2:4, got 0.9"),
        ("1:4", 0.5, {}, "sparsity must be 0.75 for structure 1:4, got 0.5"),
        ("1:3", 0.667, {}, "sparsity must be 0.6666.* for structure 1:3, got 0.667"),
        ("2:4", 0.5, {"scope": "erk"}, "scope must be global or layer for .*2:4"),
        ("2:4", 0.5, {"min_per_layer": 1}, "min_per_layer must be 0 for .*, got 1"),
        ("2:4", 2.0, {}, "sparsity must be a number in"),
    ],
)
def test_what_n_of_m_does_not_go_with(structure, sparsity, options, match):
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.select_masks(scores_of((4, 4)), sparsity, structure=structure, **options)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prune(net, None, "fts", sparsity, structure=structure, **options)


def test_a_computed_sparsity_is_that_of_its_groups():
    scores = scores_of((4, 9))
    for sparsity in (2 / 3, 1 - 1 / 3, 0.1 + 0.5666666666666667):
        assert fp.select_masks(scores, sparsity, structure="1:3").kept() == 12


def test_groups_of_the_truth():
    """The truth itself, once by hand: inputs are consecutive at each tap."""
    assert groups_of(2, (1, 3, 2))[:2] == [[0, 2], [1, 3]]
    assert groups_of(2, (4, 1), True) == [[0, 1], [2, 3]]
    assert units_of("blocks:2x2", (2, 3)) == [[0, 1, 3, 4], [2, 5]]
    assert truth.keep_largest({"a": torch.tensor([1.0, 2])}, 1)["a"].tolist() == [0, 1]
