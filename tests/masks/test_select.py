"""Keep counts and selection."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import fisherprune as fp
from fisherprune.masks import select
from fisherprune.masks.densities import erk_densities, keep_counts
from fisherprune.masks.select import SCOPES, checked_sparsity, keep_count, kept_counts


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


@given(st.integers(1, 10**10), st.decimals(0, 1, places=4))
def test_keep_count_is_exact_for_decimals(n, sparsity):
    exact = math.floor((1 - Fraction(sparsity)) * n)
    assert keep_count(n, float(sparsity)) == max(1, exact)


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


def scores_of(*shapes):
    return {f"layer{i}": torch.randn(shape) for i, shape in enumerate(shapes)}


def test_global_keeps_the_largest_over_all():
    scores = scores_of((20, 3, 3, 3), (7,), (0,), (30, 11))
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        masks = fp.select_masks(scores, sparsity)
        k = keep_count(540 + 7 + 330, sparsity)
        assert masks.kept() == k
        for name, mask in truth.keep_largest(scores, k).items():
            assert torch.equal(masks[name], mask)


def test_layer_scope_keeps_the_largest_of_each():
    scores = scores_of((20, 3), (7,), (0,), (30, 11))
    masks = fp.select_masks(scores, 0.8, scope="layer")
    for name, s in scores.items():
        k = keep_count(s.numel(), 0.8)
        assert torch.equal(masks[name], truth.keep_largest({name: s}, k)[name])


@pytest.mark.parametrize("scope", ["erk", "densities"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_densities_say_how_many_and_scores_which(scope, sparsity):
    scores = scores_of((20, 3, 3, 3), (7,), (0,), (30, 11))
    given = {name: 0.1 + i for i, name in enumerate(scores)}
    masks = fp.select_masks(
        scores, sparsity, scope, densities=given if scope == "densities" else None
    )
    if scope == "erk":
        given = erk_densities({name: s.shape for name, s in scores.items()})
    keep = keep_count(877, sparsity)
    counts = keep_counts(given, {n: s.numel() for n, s in scores.items()}, keep)
    assert masks.kept() == keep
    for name, s in scores.items():
        wanted = truth.keep_largest({name: s}, counts[name])[name]
        assert torch.equal(masks[name], wanted)


def test_the_densities_of_masks_give_their_counts_back():
    scores = {n: s.abs() ** 3 for n, s in scores_of((30, 7), (5, 40), (90,)).items()}
    scores["layer2"] *= 1e-9  # collapses
    for sparsity in (0.13, 0.5, 0.9):
        masks = fp.select_masks(scores, sparsity)
        random = scores_of((30, 7), (5, 40), (90,))
        density = masks.density()
        other = fp.select_masks(random, sparsity, "densities", densities=density)
        assert {n: int(m.sum()) for n, m in other.items()} == {
            n: int(m.sum()) for n, m in masks.items()
        }


def test_densities_that_do_not_fit():
    scores = scores_of((4,), (6,))
    for densities, scope, match in [
        (None, "densities", "densities must be given for scope densities"),
        ({"layer0": 1, "layer1": 1}, "erk", "and for no other; scope is erk"),
        ({"layer0": 1}, "densities", "they lack 'layer1'"),
        ({"layer0": 1, "layer1": 1, "x": 1}, "densities", "they name unknown 'x'"),
        ({"layer0": 1, "layer1": -1}, "densities", "at least 0, got -1 for 'layer1'"),
        ({"layer0": 1, "layer1": 0}, "densities", "at most 4 weights can be kept.* 5"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.select_masks(scores, 0.5, scope, densities=densities)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_list_of_sparsities_gives_a_list_of_the_same_masks(scope):
    scores, sparsities = scores_of((50, 4), (9, 9)), [0.1, 0.5, 0.5, 0.99]
    options = {"scope": scope}
    if scope == "densities":
        options["densities"] = {"layer0": 2, "layer1": 0.5}
    together = fp.select_masks(scores, sparsities, **options)
    for sparsity, masks in zip(sparsities, together, strict=True):
        alone = fp.select_masks(scores, sparsity, **options)
        assert all(torch.equal(alone[name], masks[name]) for name in scores)


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_the_host_reads_once(scope, monkeypatch):
    """On a GPU every reading waits for the device."""
    read = []

    def reading(name, real):
        return lambda tensor, *args: read.append(name) or real(tensor, *args)

    for name in ("tolist", "item", "cpu", "__int__", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, reading(name, real))
    fp.select_masks(scores_of((20, 3), (7,), (0,), (30, 11)), [0.5, 0.8], scope)
    assert read == ["tolist"]


def test_ties_go_to_the_first_in_order():
    scores = {"a": torch.zeros(4), "b": -torch.zeros(4), "c": torch.zeros(4)}
    masks = fp.select_masks(scores, 0.5, ties="position")
    assert [m.tolist() for m in masks.values()] == [
        [True] * 4,
        [True, True, False, False],
        [False] * 4,
    ]


def test_half_precision_is_widened_exactly():
    scores = scores_of((40, 9), (25,))
    for dtype in (torch.float16, torch.bfloat16):
        narrow = {n: s.to(dtype) for n, s in scores.items()}
        wide = {n: s.float() for n, s in narrow.items()}
        a, b = fp.select_masks(narrow, 0.7), fp.select_masks(wide, 0.7)
        assert all(torch.equal(a[n], b[n]) for n in scores)


def test_strided_scores_and_scores_that_require_grad():
    scores = {"a": torch.randn(8, 6).mT, "b": torch.randn(5, requires_grad=True)}
    masks = fp.select_masks(scores, 0.6)
    wanted = truth.keep_largest({n: s.detach() for n, s in scores.items()}, 21)
    assert all(torch.equal(masks[n], wanted[n]) for n in scores)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 60))
def test_selection_over_devices_equals_the_one_on_a_device(n, values, keep):
    tensors = {
        "a": torch.randint(-values, values + 1, (n,)) / 4,
        "b": torch.randn(7),
        "c": torch.randint(-values, values + 1, (3, 5)) / 4,
    }
    total = n + 22
    keep = max(1, min(keep, total))
    found = select.select_over_devices(tensors, keep)
    wanted = truth.keep_largest(tensors, keep)
    assert all(torch.equal(found[name], wanted[name]) for name in tensors)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), "0.5", None, True, 2])
def test_bad_sparsity(bad):
    with pytest.raises(
        fp.FisherpruneError, match=r"sparsity must be a number in \[0, 1"
    ):
        fp.select_masks(scores_of((4,)), bad)
    with pytest.raises(fp.FisherpruneError, match="sparsity"):
        fp.select_masks(scores_of((4,)), [0.5, bad])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_the_parameter(bad):
    scores = scores_of((4,), (3, 3))
    scores["layer1"][1, 2] = bad
    match = "'layer1'.* must be finite, 1 of 9 entries are NaN or infinite"
    for scope in SCOPES:
        given = dict.fromkeys(scores, 1) if scope == "densities" else None
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.select_masks(scores, 0.5, scope, densities=given)
    with pytest.raises(fp.FisherpruneError, match=match):
        select.select_over_devices(scores, 3)


def test_other_bad_arguments():
    with pytest.raises(fp.FisherpruneError, match="scope must be one of .*'channel'"):
        fp.select_masks(scores_of((4,)), 0.5, scope="channel")
    for empty in ({}, {"a": torch.empty(0)}):
        with pytest.raises(fp.FisherpruneError, match="at least one entry"):
            fp.select_masks(empty, 0.5)
    for dtype in (torch.float64, torch.int32, torch.complex64, torch.bool):
        with pytest.raises(
            fp.FisherpruneError, match=f"'a' must be float32, got {dtype}"
        ):
            fp.select_masks({"a": torch.ones(3).to(dtype)}, 0.5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.55, 0.9])
def test_kept_counts_are_those_of_the_masks(scope, sparsity):
    scores = scores_of((20, 3, 3, 3), (7,), (0,), (30, 11))
    given = {"densities": dict.fromkeys(scores, 0.5)} if scope == "densities" else {}
    shapes = {name: s.shape for name, s in scores.items()}
    counts = kept_counts(shapes, sparsity, scope, **given)
    masks = fp.select_masks(scores, sparsity, scope, **given)
    if scope == "global":
        assert counts == masks.kept()
    else:
        assert counts == {name: int(mask.sum()) for name, mask in masks.items()}


def test_kept_counts_refuse_what_the_selection_would():
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
            kept_counts(**{"shapes": shapes, "sparsity": 0.2} | options)


def tied(tensors, keep):
    """Say from sorted scores whether position decides too much."""
    ordered = torch.cat([t.flatten() for t in tensors.values()]).sort().values.flip(0)
    n = len(ordered)
    if not 0 < keep < n:
        return False
    threshold = ordered[keep - 1]
    kept = int((ordered[:keep] == threshold).sum())
    removed = int((ordered[keep:] == threshold).sum())
    some = max(10, keep // 20 + 1)
    return min(kept, removed) >= some or kept + removed == n


@given(
    st.integers(1, 400), st.integers(0, 400), st.integers(1, 40), st.integers(0, 460)
)
def test_ties_are_refused_where_they_decide(n, zeros, values, keep):
    tensors = {
        "a": torch.cat([torch.randn(n), torch.zeros(zeros)]),
        "b": torch.randint(-values, values + 1, (60,)) / 4,
    }
    total = n + zeros + 60
    keep = max(1, min(keep, total))
    sparsity = 1 - keep / total
    wanted = truth.keep_largest(tensors, keep)
    found = fp.select_masks(tensors, sparsity, ties="position")
    assert all(torch.equal(found[name], wanted[name]) for name in tensors)
    if tied(tensors, keep):
        for choose in (
            lambda: fp.select_masks(tensors, sparsity),
            lambda: fp.select_masks(tensors, [0.0, sparsity]),
            lambda: select.select_over_devices(tensors, keep, "error"),
        ):
            with pytest.raises(fp.FisherpruneError, match="scores must decide which"):
                choose()
    else:
        assert fp.select_masks(tensors, sparsity) == found
        assert found == select.select_over_devices(tensors, keep, "error")


@pytest.mark.parametrize("keep", [30, 199, 200, 400])
def test_how_many_ties_decide(keep):
    """More than a twentieth of the kept weights and at least 10, on either side."""
    some = {30: 10, 199: 10, 200: 11, 400: 21}[keep]
    for kept, removed in ((some, some), (some - 1, some), (some, some - 1)):
        above, below = torch.rand(keep - kept) + 2, torch.rand(500)
        scores = {"a": torch.cat([above, below, torch.ones(kept + removed)])}
        options = {"sparsity": 1 - keep / scores["a"].numel()}
        if (kept, removed) == (some, some):
            with pytest.raises(fp.FisherpruneError, match="scores must decide"):
                fp.select_masks(scores, **options)
        else:
            assert fp.select_masks(scores, **options).kept() == keep


def test_the_message_names_the_parameters_with_the_most_ties():
    scores = {"a": torch.rand(100), "b": torch.zeros(2000), "c": torch.zeros(3000)}
    with pytest.raises(
        fp.FisherpruneError,
        match=r"but 5,000 equal scores of 0 compete for 2,450 places, most of them in "
        r"'c' \(3,000\), 'b' \(2,000\): such are .* ties=.position. keeps the first",
    ):
        fp.select_masks(scores, 0.5)
    assert fp.select_masks(scores, 0.99).kept() == 51  # decided by the others
    for scope in ("layer", "erk"):
        with pytest.raises(fp.FisherpruneError, match="in 'c' .3,000., 'b' .2,000.:"):
            fp.select_masks(scores, 0.5, scope)
        masks = fp.select_masks(scores, 0.5, scope, ties="position")
        assert masks["b"][: int(masks["b"].sum())].all()


def test_scores_that_tie_and_decide():
    """Rounding, masks from before, scores of a whole layer, all or nothing kept."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, generator=generator) ** 2
    for power in (1, 4):
        rounded = {"a": (scores**power).bfloat16()}
        for sparsity in (0.5, 0.8, 0.9, 0.98, 0.999):
            fp.select_masks(rounded, sparsity)
    masked = scores * (torch.rand(200_000, generator=generator) < 0.4)
    fp.select_masks({"a": masked}, [0.7, 0.9])
    fp.select_masks({"a": torch.zeros(1000), "b": torch.rand(9000)}, 0.5)
    fp.select_masks({"a": torch.rand(500).repeat(2)}, 0.499)
    fp.select_masks({"a": torch.zeros(1000)}, 0.0)
    fp.select_masks({"a": torch.zeros(0), "b": torch.rand(5)}, 0.5, "layer")
    fp.select_masks({"a": torch.rand(1000), "b": torch.ones(20)}, 1.0)


def test_scores_of_other_kinds_are_named():
    for scores, got in [
        ([torch.ones(3)], "a dict of tensors by parameter name, got list"),
        (None, "a dict of tensors by parameter name, got NoneType"),
        (torch.ones(3), "a dict of tensors by parameter name, got Tensor"),
        ({"a": np.ones(3, np.float32)}, "'a' must be a float32 tensor, got ndarray"),
        ({"a": [1.0]}, "'a' must be a float32 tensor, got list"),
        (
            {"a": torch.eye(3).to_sparse()},
            "'a' must be a dense tensor, got a sparse one",
        ),
        (
            {"a": torch.ones(3, device="meta")},
            "dense tensor, got one on the meta device",
        ),
        ({"a": torch.nested.nested_tensor([torch.ones(2)])}, "got a nested one"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=f"select_masks: scores .*{got}"):
            fp.select_masks(scores, 0.5)
    for scope in (None, ["global"], np.array(["global", "layer"]), torch.ones(2)):
        with pytest.raises(fp.FisherpruneError, match="scope must be one of .*, got"):
            fp.select_masks(scores_of((4,)), 0.5, scope)
    for ties in (None, "first", ["error"], torch.ones(2)):
        with pytest.raises(fp.FisherpruneError, match=r"ties must be one of .*, got"):
            fp.select_masks(scores_of((4,)), 0.5, ties=ties)
        with pytest.raises(fp.FisherpruneError, match=r"ties must be one of .*, got"):
            fp.prune(torch.nn.Linear(2, 2), None, ties=ties)
