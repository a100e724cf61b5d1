"""Selection."""

import numpy as np
import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import scores_of

import fisherprune as fp
from fisherprune.masks.counts import keep_count
from fisherprune.masks.densities import erk_densities, keep_counts
from fisherprune.masks.devices import select_over_devices
from fisherprune.masks.scopes.registry import SCOPES


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
    scores, sparsities = scores_of((2, 1), (50, 4), (9, 9)), [0.1, 0.5, 0.5, 0.99]
    options = {"scope": scope}
    if scope == "densities":
        options["densities"] = {"layer0": 2, "layer1": 0.5, "layer2": 1}
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


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 60))
def test_selection_over_devices_equals_the_one_on_a_device(n, values, keep):
    tensors = {
        "a": torch.randint(-values, values + 1, (n,)) / 4,
        "b": torch.randn(7),
        "c": torch.randint(-values, values + 1, (3, 5)) / 4,
    }
    total = n + 22
    keep = max(1, min(keep, total))
    found = select_over_devices(tensors, keep)
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
        select_over_devices(scores, 3)


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
