"""Masks: comparison, application, files."""

import copy
import os
import pickle
import warnings

import pytest
import torch
from mask_cases import assert_zero_where_pruned, half_masks
from nets import conv_net
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fisherprune as fp
from fisherprune.errors import LayerCollapseWarning
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


def test_apply_sets_pruned_weights_to_zero_and_no_others():
    model, masks = conv_net(), None
    masks = half_masks(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks.apply_(model)
    assert_zero_where_pruned(model, masks)
    for name, p in model.named_parameters():
        kept = masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p[kept], before[name][kept])


def test_apply_removes_nan_too():
    model = conv_net()
    masks = half_masks(model)
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = float("nan")
    masks.apply_(model)
    assert_zero_where_pruned(model, masks)


def test_masks_of_another_model_are_refused():
    masks = half_masks(conv_net())
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(fp.FisherpruneError, match=r"'0.weight' .* has shape \[2, 3\]"):
        masks.apply_(other)
    with pytest.raises(fp.FisherpruneError, match="has no parameter '0.weight'"):
        masks.apply_(nn.ReLU())
    model = conv_net()
    foreign = torch.optim.SGD(conv_net().parameters(), 0.1)
    with pytest.raises(fp.FisherpruneError, match="does not train '0.weight'"):
        masks.hold(model, foreign)
    with pytest.raises(fp.FisherpruneError, match="optimizer must be .* got 'adam'"):
        masks.hold(model, "adam")


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


class Wrapped(nn.Module):
    """Has a child that is called as wrappers call theirs, and one that is not."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.head(self.module(x)))


WRAPS = {
    "plain": lambda m: m,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("build", [conv_net, Wrapped])
@pytest.mark.parametrize("made", WRAPS)
@pytest.mark.parametrize("used", WRAPS)
def test_masks_fit_whichever_side_is_wrapped(build, made, used):
    model = build()
    twin = copy.deepcopy(model)
    masks = fp.prune(WRAPS[made](model), [], "magnitude", 0.6)
    plain = fp.prune(twin, [], "magnitude", 0.6)
    assert masks == plain and list(masks) == list(fp.prunable_parameters(twin))
    named = dict(WRAPS[made](twin).named_parameters())
    names = {id(p): name for name, p in named.items()}
    raw = Masks({names[id(twin.get_parameter(n))]: m for n, m in plain.items()})
    for given in (masks, raw):
        other = build()
        given.apply_(WRAPS[used](other))
        assert_zero_where_pruned(other, plain)
        other = build()
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        with given.hold(WRAPS[used](other), optimizer):
            for parameter in other.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            assert_zero_where_pruned(other, plain)
        assert given.jaccard(plain) == 1
        scores = {
            name: torch.rand_like(m, dtype=torch.float) for name, m in plain.items()
        }
        density = given.density()
        found = fp.select_masks(scores, 0.6, "densities", densities=density)
        assert found.density() == plain.density()


def test_a_wrapped_module_inside_of_a_model():
    model = conv_net()
    masks = half_masks(model)
    model[3] = torch.compile(model[3], backend="eager")
    masks.apply_(model)
    assert not model[3]._orig_mod.weight[~masks["3.weight"]].any()
    assert list(fp.prunable_parameters(model)) == list(masks)


def test_layers_without_weights_are_named_once():
    model = conv_net()
    masks = Masks(
        {"0.bias": torch.zeros(6) > 0, "0.weight": torch.rand(6, 3, 3, 3) < 0.5}
        | {"3.weight": torch.zeros(8, 3, 3, 3) > 0}
    )
    with pytest.warns(LayerCollapseWarning, match=r"of 1 of 3 .* layers: '3.weight';"):
        masks.apply_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.hold(model).remove()
        masks.apply_(model)
    with pytest.warns(LayerCollapseWarning, match="'3.weight'"):
        Masks(masks).hold(model).remove()


def test_files_of_bools_that_another_tool_wrote(tmp_path):
    masks = half_masks(conv_net())
    save_file(dict(masks), tmp_path / "foreign", metadata={"format": "pt"})
    assert Masks.load(tmp_path / "foreign") == masks
    save_file(dict(masks), tmp_path / "foreign")
    assert Masks.load(tmp_path / "foreign") == masks
    save_file({"a": torch.ones(2) > 0, "b": torch.ones(2)}, tmp_path / "mixed")
    save_file({}, tmp_path / "none")
    for name in ("mixed", "none"):
        with pytest.raises(fp.FisherpruneError, match=f"{name}' holds no masks"):
            Masks.load(tmp_path / name)


@pytest.mark.parametrize("path", [None, 3, b"masks", ["masks"]])
def test_what_is_no_path(path):
    for use in (Masks.load, half_masks(conv_net()).save):
        with pytest.raises(fp.FisherpruneError, match="path must be a path, got"):
            use(path)


def test_files_round_trip(tmp_path):
    masks = half_masks(conv_net())
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert list(loaded) == list(masks)
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_files_keep_the_order_and_repeat(tmp_path):
    masks = Masks({f"layer{i}": torch.rand(3) < 0.5 for i in torch.randperm(12)})
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert list(loaded) == list(masks)
    first = (tmp_path / "masks.safetensors").read_bytes()
    for _ in range(8):
        loaded.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == first


def test_files_without_an_order_load(tmp_path):
    masks = half_masks(conv_net())
    save_file(dict(masks), tmp_path / "old", metadata={"format": "fisherprune-masks-1"})
    loaded = Masks.load(tmp_path / "old")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)


def test_masks_that_share_memory_are_saved(tmp_path):
    mask = torch.rand(4, 6) < 0.5
    masks = Masks({"a": mask, "b": mask, "c": mask.t(), "d": mask[:1].expand(3, 6)})
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)


def test_bad_files_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    half_masks(conv_net()).save(good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-9])
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(os.urandom(200))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    odd = tmp_path / "odd.safetensors"
    save_file(
        {"a": torch.ones(2) > 0}, odd, metadata={"fisherprune-masks-1": '["a", "b"]'}
    )
    with pytest.raises(fp.FisherpruneError, match="absent.* does not exist"):
        Masks.load(tmp_path / "absent")
    for path in (cut, noise, odd):
        with pytest.raises(fp.FisherpruneError, match=f"{path.name}.* can't be read"):
            Masks.load(path)
    with pytest.raises(fp.FisherpruneError, match="foreign.* holds no masks"):
        Masks.load(foreign)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        half_masks(conv_net()).save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]
