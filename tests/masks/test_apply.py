"""Masks on models."""

import copy
import warnings

import pytest
import torch
from mask_cases import assert_zero_where_pruned, half_masks
from nets import conv_net
from torch import nn

import fisherprune as fp
from fisherprune.errors import LayerCollapseWarning
from fisherprune.masks.masks import Masks

WRAPS = {
    "plain": lambda m: m,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


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


class Wrapped(nn.Module):
    """Has a child that is called as wrappers call theirs, and one that is not."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.head(self.module(x)))


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
