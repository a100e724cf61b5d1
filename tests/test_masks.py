"""Masks: application, holding through training, files."""

import os

import pytest
import torch
from nets import conv_net
from safetensors.torch import save_file
from torch import nn

import fisherprune as fp
from fisherprune.masks import Masks


def half_masks(model):
    return Masks({n: torch.rand_like(p) < 0.5 for n, p in masked(model)})


def masked(model):
    return fp.prunable_parameters(model).items()


def assert_zero_where_pruned(model, masks):
    for name, mask in masks.items():
        weights = model.get_parameter(name)
        assert not weights[~mask].any(), name
        assert not torch.signbit(weights[~mask]).any(), name


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


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def steps(model, optimizer, count):
    x, y = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("warm", [0, 3], ids=["fresh", "after_warm_up"])
def test_hold_keeps_exact_zeros(optimizer, warm):
    model = conv_net()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    steps(model, optimizer, warm)
    masks = half_masks(model)
    masks.hold(model, optimizer)
    assert_zero_where_pruned(model, masks)
    kept = model[3].weight.detach().clone()
    for _ in range(3):
        steps(model, optimizer, 1)
        assert_zero_where_pruned(model, masks)
        for name, mask in masks.items():
            assert not model.get_parameter(name).grad[~mask].any()
    assert not torch.equal(model[3].weight, kept)


def test_without_the_hold_momentum_moves_pruned_weights():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer, 2)
    masks = half_masks(model)
    masks.apply_(model)
    steps(model, optimizer, 1)
    assert model[0].weight[~masks["0.weight"]].any()


def test_hold_equals_training_the_masked_network():
    """The kept weights move as if w * mask were the network's weight."""
    model, twin = conv_net(), conv_net()
    twin.load_state_dict(model.state_dict())
    masks = half_masks(model)
    for name, mask in masks.items():
        module = twin.get_submodule(name.rpartition(".")[0])
        masked = nn.Module()
        masked.forward = lambda w, mask=mask: w * mask
        nn.utils.parametrize.register_parametrization(module, "weight", masked)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, twin)]
    masks.hold(model, optimizers[0])
    x, y = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    for i in (0, 3, 5, 7, 9):
        torch.testing.assert_close(model[i].weight, twin[i].weight)


def test_hold_ends():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = half_masks(model)
    with masks.hold(model, optimizer) as hold:
        steps(model, optimizer, 1)
        assert_zero_where_pruned(model, masks)
    steps(model, optimizer, 1)
    assert model[0].weight[~masks["0.weight"]].any()
    hold.remove()


def test_gradient_norm_is_that_of_the_pruned_network():
    model = conv_net()
    masks = half_masks(model)
    masks.hold(model, OPTIMIZERS["sgd"](model.parameters()))
    x, y = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    for name, mask in masks.items():
        assert not model.get_parameter(name).grad[~mask].any()


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


def test_bad_masks_are_refused():
    with pytest.raises(fp.FisherpruneError, match="at least one mask"):
        Masks({})
    with pytest.raises(fp.FisherpruneError, match="'a' must be a bool tensor"):
        Masks({"a": torch.ones(3)})


def test_files_round_trip(tmp_path):
    masks = half_masks(conv_net())
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert list(loaded) == list(masks)
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_bad_files_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    half_masks(conv_net()).save(good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-9])
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(os.urandom(200))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    with pytest.raises(fp.FisherpruneError, match="absent.* does not exist"):
        Masks.load(tmp_path / "absent")
    for path in (cut, noise):
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
