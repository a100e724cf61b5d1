"""Masks: counts and comparison."""

import copy
import pickle

import pytest
import torch
from mask_cases import half_masks
from nets import conv_net
from torch.profiler import ProfilerActivity, profile

import fisherprune as fp
from fisherprune.masks.masks import Masks


def test_is_a_mapping_with_counts():
    masks = Masks({"a": torch.tensor([True, False, True]), "b": torch.zeros(5) > 0})
    assert list(masks) == ["a", "b"] and len(masks) == 2
    assert masks.kept() == 2 and masks.total() == 8
    assert masks.sparsity() == 0.75
    assert masks.density() == {"a": 2 / 3, "b": 0.0}
    assert repr(masks) == "Masks(2 parameters, 2 of 8 weights kept)"


def test_jaccard_is_the_overlap_of_the_kept_sets():
    model = conv_net()
    a, b = half_masks(model), half_masks(model)
    kept = [
        {
            (n, i)
            for n, m in masks.items()
            for i in m.flatten().nonzero().flatten().tolist()
        }
        for masks in (a, b)
    ]
    assert a.jaccard(b) == len(kept[0] & kept[1]) / len(kept[0] | kept[1])
    assert a.jaccard(b) == b.jaccard(a) and a.jaccard(a) == 1
    for name, overlap in a.jaccard_by_layer(b).items():
        sets = [{i for n, i in one if n == name} for one in kept]
        assert overlap == len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_jaccard_of_masks_that_keep_nothing():
    none, some = (
        Masks({"a": torch.tensor(keep), "b": torch.ones(2) > 0})
        for keep in ([False, False], [False, True])
    )
    assert none.jaccard_by_layer(none) == {"a": 1.0, "b": 1.0}
    assert none.jaccard_by_layer(some) == {"a": 0.0, "b": 1.0}
    assert none.jaccard(some) == 2 / 3


def test_jaccard_of_other_networks_masks_is_refused():
    a = Masks({"a": torch.ones(2) > 0})
    with pytest.raises(fp.FisherpruneError, match="same parameters, 'b' is in one"):
        a.jaccard(Masks({"a": a["a"], "b": a["a"]}))
    with pytest.raises(fp.FisherpruneError, match=r"'a' must .* got \[2\] and \[3\]"):
        a.jaccard(Masks({"a": torch.ones(3) > 0}))


@pytest.mark.parametrize(
    "masks, message",
    [
        ({}, "masks must hold at least one mask, got none"),
        (None, "masks must map parameter names to bool tensors, got None"),
        ([torch.ones(3) > 0], "masks must map .* got .tensor"),
        ({"a": torch.ones(3)}, "mask of 'a' must be a bool tensor, got torch.float32"),
        ({"a": True}, "mask of 'a' must be a bool tensor, got True"),
        ({3: torch.ones(3) > 0}, "names must be strings, got 3"),
    ],
)
def test_bad_masks_are_refused(masks, message):
    with pytest.raises(fp.FisherpruneError, match=f"Masks: {message}"):
        Masks(masks)
    good = Masks({"a": torch.ones(3) > 0})
    with pytest.raises(fp.FisherpruneError, match=f"jaccard: {message}"):
        good.jaccard(masks)


def test_masks_without_weights():
    masks = Masks({"a": torch.zeros(0, 3, dtype=torch.bool)})
    assert masks.sparsity() == 0.0 and masks.density() == {"a": 1.0}
    assert repr(masks) == "Masks(1 parameters, 0 of 0 weights kept)"


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.nested.nested_tensor([torch.ones(2) > 0]), "a nested one"),
        ((torch.eye(3) > 0).to_sparse(), "a sparse one"),
        (torch.ones(3, device="meta") > 0, "one on the meta device"),
    ],
)
def test_masks_are_dense(mask, got):
    with pytest.raises(fp.FisherpruneError, match=f"'a' must be a dense .* got {got}"):
        Masks({"a": mask})


def test_masks_are_compared_and_combined():
    a = Masks({"a": torch.tensor([True, False, True]), "b": torch.zeros(2) > 0})
    b = Masks({"b": torch.ones(2) > 0, "a": torch.tensor([True, True, False])})
    assert a == a.to("cpu") == copy.deepcopy(a) == pickle.loads(pickle.dumps(a))
    assert a == dict(a) and dict(a) == a and a != b and a != 3 and a != {"a": a["a"]}
    assert a != {"a": a["a"].float(), "b": a["b"]} and a != {"a": 1, "b": 2}
    assert a != Masks({"a": a["a"], "b": torch.zeros(2, 1) > 0})
    assert {n: m.tolist() for n, m in (a & b).items()} == {
        "a": [True, False, False],
        "b": [False, False],
    }
    assert a | b == Masks({"a": torch.ones(3) > 0, "b": torch.ones(2) > 0})
    assert (~a)["a"].tolist() == [False, True, False] and ~~a == a
    assert a & ~a == Masks({"a": torch.zeros(3) > 0, "b": torch.zeros(2) > 0})
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    with pytest.raises(TypeError, match="unsupported operand"):
        a & 3
    with pytest.raises(fp.FisherpruneError, match=r"\|: masks must be of the same"):
        a | {"a": a["a"]}
    with pytest.raises(fp.FisherpruneError, match="to: device must be .* got 'gpu'"):
        a.to("gpu")


def test_counting_makes_no_copy_of_the_masks():
    """A sum widens bools to integers of 8 bytes first."""
    masks = Masks({"a": torch.rand(2**20) < 0.5, "b": torch.rand(2**10, 2**10) < 0.5})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        repr(masks), masks.kept(), masks.density(), masks.sparsity()
    assert max(event.cpu_memory_usage for event in seen.events()) < 2**16
