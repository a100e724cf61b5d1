"""Sanity baselines: what each destroys, and what it keeps."""

import copy
from collections import Counter

import pytest
import torch
from nets import conv_net
from torch import nn

import fisherprune as fp
from fisherprune.baselines import invert_scores, reinitialize_, shuffle_masks


def masks_of(*shapes):
    return fp.Masks({f"layer{i}": torch.rand(s) < 0.4 for i, s in enumerate(shapes)})


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_inverted_scores_keep_what_the_others_prune(scope):
    scores = {"a": torch.randn(8, 8), "b": torch.randn(4, 4, 4)}
    best = fp.select_masks(scores, 0.5, scope)
    worst = fp.select_masks(invert_scores(scores), 0.5, scope)
    assert all(torch.equal(worst[name], ~best[name]) for name in scores)


def test_shuffled_masks_keep_as_many_in_each_layer():
    masks = masks_of((40, 30), (5, 5, 3, 3), (0,), (1,))
    shuffled = shuffle_masks(masks, 3)
    for name, mask in masks.items():
        assert shuffled[name].shape == mask.shape
        assert shuffled[name].sum() == mask.sum()
    assert not torch.equal(shuffled["layer0"], masks["layer0"])
    assert equal(shuffled, shuffle_masks(masks, 3))
    assert not equal(shuffled, shuffle_masks(masks, 4))


def test_every_permutation_is_as_likely():
    masks = fp.Masks({"a": torch.tensor([True, False, False, True])})
    seen = Counter(
        tuple(shuffle_masks(masks, seed)["a"].tolist()) for seed in range(600)
    )
    assert len(seen) == 6 and all(60 < count < 150 for count in seen.values())


def test_layers_are_shuffled_apart():
    mask = torch.rand(1000) < 0.5
    shuffled = shuffle_masks({"a": mask, "b": mask}, 0)
    assert not torch.equal(shuffled["a"], shuffled["b"])
    assert torch.equal(shuffled["b"], shuffle_masks({"b": mask}, 0)["b"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_move_no_baseline(dtype):
    masks, model, twin = masks_of((20, 30), (4,)), conv_net(), conv_net()
    expected = shuffle_masks(masks, 1)
    reinitialize_(model, seed=1)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = shuffle_masks(masks, 1)
            reinitialize_(twin, seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(found, expected) and equal(state(twin), state(model))


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss = model.train()(torch.randn(8, 3, 9, 9)).square().mean()
    loss.backward()
    optimizer.step()
    return optimizer


def test_reinitialized_is_as_new():
    model = conv_net()
    optimizer = trained(model)
    before, global_state = state(model), torch.random.get_rng_state()
    reinitialize_(model, optimizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    bn = model[1]
    assert not bn.running_mean.any() and (bn.running_var == 1).all()
    assert (bn.weight == 1).all() and bn.num_batches_tracked == 0
    for name in ("0.weight", "9.bias", "12.weight"):
        same = torch.isclose(model.get_parameter(name), before[name])
        assert same.double().mean() < 0.02, name
    bound = model[9].in_features ** -0.5  # of nn.Linear's own initialization
    weights = model[9].weight.abs()
    assert 0.9 * bound < weights.max() <= bound
    assert weights.mean().item() == pytest.approx(bound / 2, rel=0.1)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1


def test_reinitialization_depends_on_the_seed_alone():
    a, b, c = conv_net(), conv_net(), conv_net()
    for model, seed in ((a, 5), (b, 5), (c, 6)):
        reinitialize_(model, seed=seed)
    assert equal(state(a), state(b)) and not torch.equal(a[0].weight, c[0].weight)


def test_momentum_of_before_moves_nothing_afterwards():
    model = conv_net()
    optimizer = trained(model)
    reinitialize_(model, optimizer, seed=2)
    new = state(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(state(model), new)


def test_a_module_that_cannot_reset_is_named_and_nothing_changes():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))

    model = nn.Sequential(nn.Linear(2, 2), Scale())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        fp.FisherpruneError, match=r"1 \(Scale\) must have a method reset_parameters"
    ):
        reinitialize_(model)
    assert equal(state(model), before)
