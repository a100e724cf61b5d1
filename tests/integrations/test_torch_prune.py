"""Masks to and from torch.nn.utils.prune, and FisherPruning in its functions."""

import doctest
import re

import pytest
import torch
from mask_cases import half_masks
from nets import TwiceNet, conv_net, data
from torch import nn
from torch.nn.utils import prune

import fisherprune as fp
from fisherprune.integrations import torch_prune as door
from fisherprune.integrations.torch_prune import FisherPruning


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too; inputs are numbers below 7."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.mix(self.words(x)))


def state(model):
    return {name: t.clone() for name, t in model.state_dict(keep_vars=True).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_examples():
    result = doctest.testmod(door)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("make", [conv_net, lambda: nn.DataParallel(conv_net())])
def test_masks_go_to_torch_and_come_back(make):
    model = make()
    masks, before = half_masks(model), state(model)
    bare = getattr(model, "module", model)
    weights = {n: bare.get_parameter(n) for n in masks}
    door.apply_masks(masks, model)
    assert door.masks_of(model) == masks
    assert all(bare.get_parameter(f"{n}_orig") is p for n, p in weights.items())
    for name, mask in masks.items():
        layer = bare.get_submodule(name.partition(".")[0])
        assert torch.equal(layer.weight, weights[name] * mask)
    assert door.remove(model) == masks
    assert not prune.is_pruned(model)
    masks.apply_(model)
    with torch.no_grad():
        for name, mask in masks.items():
            prefix = "" if bare is model else "module."
            before[prefix + name] *= mask
    assert same(state(model), before)


def test_what_is_pruned_already_stays_pruned():
    model = conv_net()
    first, second = half_masks(model), half_masks(model)
    door.apply_masks(first, model)
    door.apply_masks(second, model)
    assert door.masks_of(model) == first & second
    assert door.remove(model) == first & second


def test_masks_that_torch_has_made_are_held():
    model = conv_net()
    for layer in (model[0], model[5]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
        prune.random_unstructured(layer, "bias", amount=2)
    buffers = {n: b.bool() for n, b in model.named_buffers() if n.endswith("_mask")}
    masks = door.remove(model)
    assert masks == {n.removesuffix("_mask"): m for n, m in buffers.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    masks.hold(model, optimizer)
    x, y = data((3, 9, 9))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks.items())


def test_training_under_torch_prune_keeps_the_zeros_and_the_optimizer():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    masks = half_masks(model)
    x, y = data((3, 9, 9))
    for step in range(4):
        if step == 1:
            door.apply_masks(masks, model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model(x)
    for name, mask in masks.items():
        weight = model.get_submodule(name.partition(".")[0]).weight
        assert not weight[~mask].any() and weight[mask].all()


@pytest.mark.parametrize("ties", ["error", "position"])
def test_global_pruning_keeps_what_prune_keeps(ties):
    """Among scores of which few are equal, and many."""
    model = TwiceNet()
    scores = fp.score(model, [data((4, 8, 8))], "fts")
    if ties == "position":
        scores = {name: torch.randint(2, s.shape).float() for name, s in scores.items()}
    wanted = fp.select_masks(scores, 0.7, ties=ties)
    given = door.importance_scores(scores, model)
    options = {"amount": 0.7, "ties": ties}
    prune.global_unstructured(
        given.keys(), FisherPruning, importance_scores=given, **options
    )
    assert door.masks_of(model) == wanted


def test_a_second_pruning_is_among_what_the_first_has_kept():
    model = conv_net()
    masks = half_masks(model)
    scores = {n: torch.randn(m.shape) for n, m in masks.items()}
    door.apply_masks(masks, model)
    given = door.importance_scores(scores, model)
    prune.global_unstructured(
        given.keys(), FisherPruning, importance_scores=given, amount=0.75
    )
    share = 1 - fp.masks.counts.keep_count(masks.kept(), 0.75) / masks.total()
    assert door.masks_of(model) == fp.select_masks(scores, share, among=masks)


@pytest.mark.parametrize("amount", [0.0, 0.4, 1.0, 0, 1, 7, 19])
def test_one_layer(amount):
    layer, scores = nn.Linear(5, 4), torch.randn(4, 5)
    FisherPruning.apply(layer, "weight", amount=amount, importance_scores=scores)
    left = max(1, 20 - (amount if isinstance(amount, int) else round(20 * amount)))
    order = scores.flatten().argsort(descending=True)[:left]
    wanted = torch.zeros(20).index_fill(0, order, 1).view(4, 5)
    assert torch.equal(layer.weight_mask, wanted)
    assert torch.equal(layer.weight, layer.weight_orig * wanted)


def test_a_mask_from_before_limits_a_tensor_too():
    scores, before = torch.randn(6, 6), (torch.rand(6, 6) < 0.8).float()
    found = FisherPruning(0.5).prune(torch.ones(6, 6), before, scores)
    wanted = fp.select_masks({"": scores}, 0.5, among={"": before != 0})[""]
    assert torch.equal(found, wanted.float())


def test_a_weight_that_modules_share():
    model = Tied()
    mask = torch.rand(7, 4) < 0.5
    door.apply_masks({"words.weight": mask}, model)
    assert model.head.weight_orig is model.words.weight_orig
    assert not model.head.weight[~mask].any() and not model.words.weight[~mask].any()
    assert door.masks_of(model) == {"words.weight": mask}
    assert door.remove(model) == {"words.weight": mask}
    assert model.head.weight is model.words.weight
    with pytest.raises(fp.FisherpruneError, match="one module each .* got shared 'wor"):
        door.importance_scores({"words.weight": torch.rand(7, 4)}, model)
    prune.custom_from_mask(model.head, "weight", mask)
    wanted = "mask of 'words.weight' must be the same in all modules that share it, got"
    with pytest.raises(fp.FisherpruneError, match=wanted):
        door.remove(model)


def test_what_only_looks_pruned():
    """Other reparametrizations, and buffers that are called masks."""
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4)))
    model[0].register_buffer("weight_mask", torch.eye(4))
    model[1].register_buffer("weight_mask_orig", torch.eye(4))
    with pytest.raises(fp.FisherpruneError, match="must be pruned by torch.nn.utils"):
        door.masks_of(model)
    prune.l1_unstructured(model[0], "bias", amount=3)
    assert door.masks_of(model).keys() == {"0.bias"}


def test_channels_last():
    model = conv_net().to(memory_format=torch.channels_last)
    (masks,) = fp.find_masks(model, [data((3, 9, 9))], "fts", [0.8])
    door.apply_masks(masks, model)
    assert door.masks_of(model) == masks


MISTAKES = {
    "name": (lambda m: door.apply_masks({**m, "x": m["0.weight"]}, conv_net()), "'x'"),
    "shape": (
        lambda m: door.apply_masks({**m, "9.weight": m["0.weight"]}, conv_net()),
        "masks of '9.weight' must be of shape [11, 175], got [6, 3, 3, 3]",
    ),
    "scores": (
        lambda m: door.importance_scores({"0.bias": torch.rand(5)}, conv_net()),
        "scores of '0.bias' must be of shape [6], got [5]",
    ),
    "dense": (
        lambda m: door.masks_of(conv_net()),
        "model must be pruned by torch.nn.utils.prune, got Sequential",
    ),
    "soft": (
        lambda m: door.masks_of(
            prune.custom_from_mask(nn.Linear(2, 1), "weight", torch.rand(1, 2) / 2)
        ),
        "mask of 'weight' must be of 0 and 1, got tensor(",
    ),
    "weights": (
        lambda m: FisherPruning.apply(nn.Linear(4, 5), "weight", amount=0.5),
        "importance_scores must be scores, without a gradient, of all parameters, got",
    ),
    "amount": (
        lambda m: FisherPruning(20).prune(torch.rand(20)),
        "amount must be at least 0 and less than the 20 weights, got 20",
    ),
    "fraction": (lambda m: FisherPruning(1.1).prune(torch.rand(20)), "sparsity must"),
    "ties": (lambda m: FisherPruning(0.5).prune(torch.ones(99)), "99 equal scores"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    mistake, text = MISTAKES[name]
    with pytest.raises(fp.FisherpruneError, match=re.escape(text)):
        mistake(half_masks(conv_net()))


def test_mistakes_change_nothing():
    model = conv_net()
    masks, before = half_masks(model), state(model)
    with pytest.raises(
        fp.FisherpruneError, match="parameters of Sequential, got one o"
    ):
        door.apply_masks({**masks, "x": masks["0.weight"]}, model)
    scores = door.importance_scores(
        {n: torch.ones(m.shape) for n, m in masks.items()}, model
    )
    for options in ({}, {"importance_scores": scores}):
        with pytest.raises(fp.FisherpruneError):
            prune.global_unstructured(
                scores.keys(), FisherPruning, amount=0.5, **options
            )
    assert same(state(model), before) and not prune.is_pruned(model)
