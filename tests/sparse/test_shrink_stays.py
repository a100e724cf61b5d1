"""Channels that stay: their removal would change outputs, or can't be followed."""

import pytest
import torch
from channel_masks import masks_keeping, shrunk, size, widths
from nets import Own
from torch import nn

import fisherprune as fp

pytest.importorskip("torch_pruning")


class Block(nn.Module):
    """A residual sum of two branches; inputs [N, 3, 6, 6]."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
        self.two, self.head = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(x).mean((2, 3))


def test_a_sum_goes_where_all_summands_do():
    model = Block()
    masks = masks_keeping(model, stem=[0, 1, 2], two=[2, 3, 4], one=[1, 2])
    match = (
        "2 of 3 of 'stem' .what 'head' reads there depends on the inputs.; "
        "2 of 3 of 'two' .what 'head' reads there depends on the inputs"
    )
    with pytest.warns(fp.FisherpruneWarning, match=match):
        small = shrunk(model, masks, torch.randn(2, 3, 6, 6), quiet=False)
    assert widths(small) == {"stem": 5, "one": 2, "two": 5, "head": 4}


def test_outputs_stay():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    masks = masks_keeping(model, _2=[0, 1])
    with pytest.warns(
        fp.FisherpruneWarning, match="3 of 3 of '2' .*outputs of the mod"
    ):
        small = shrunk(model, masks, torch.randn(2, 4), quiet=False)
    assert size(small) == size(model)
    both = Own(
        lambda m, x: (h := torch.relu(m.one(x)), m.two(h))[1] + 0 * h.sum() + h[:, :3],
        one=nn.Linear(4, 6),
        two=nn.Linear(6, 3),
    )
    masks = masks_keeping(both, one=[0, 4])
    assert widths(shrunk(both, masks, torch.randn(2, 4))) == widths(both)


def test_one_channel_stays():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    with pytest.warns(fp.FisherpruneWarning, match="1 of 6 of '0' .'2' needs one"):
        small = shrunk(
            model, masks_keeping(model, _0=[]), torch.randn(2, 4), quiet=False
        )
    assert widths(small) == {"0": 1, "2": 5}


def test_resnet20s_shortcuts_can_not_be_followed():
    """Zeros are padded around their channels, which Torch-Pruning does not see."""
    model = fp.models.resnet20(num_classes=5)
    layers = {
        n.replace(".", "__"): [*range(4, m.out_channels)]
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and not n.endswith("conv1")
    }
    masks = masks_keeping(model, conv1=[*range(4, 16)], **layers)
    with pytest.warns(fp.FisherpruneWarning, match="Torch-Pruning can't follow them"):
        small = shrunk(model, masks, torch.randn(2, 3, 8, 8), quiet=False)
    assert size(small) == size(model)


def shuffled(x):
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


STAYING = {
    "a group norm": (lambda m, h: m.norm(h), {"norm": nn.GroupNorm(2, 6)}, "GroupNorm"),
    "a layer norm": (
        lambda m, h: m.norm(h.mT).mT,
        {"norm": nn.LayerNorm(6)},
        "'norm' is a LayerNorm",
    ),
    "attention": (
        lambda m, h: m.attend(h.mT, h.mT, h.mT)[0].mT,
        {"attend": nn.MultiheadAttention(6, 2, batch_first=True)},
        "'attend' is a MultiheadAttention",
    ),
    "a softmax of channels": (lambda m, h: h.softmax(1), {}, "depends on the inputs"),
    "a mean of channels": (lambda m, h: h - h.mean(1, True), {}, "depends on the inp"),
    "a norm of channels": (
        lambda m, h: h * h.norm(dim=1, keepdim=True),
        {},
        "depends on the inputs",
    ),
    "channels in another order": (lambda m, h: shuffled(h), {}, "can't follow them"),
    "channels from behind": (lambda m, h: h.flip(1), {}, "can't follow them"),
    "a gate": (
        lambda m, h: h * torch.sigmoid(m.gate(h.mean(2)))[..., None] + h.mean(),
        {"gate": nn.Linear(6, 6)},
        "depends on the inputs",
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_stays(name):
    mix, parts, match = STAYING[name]
    model = Own(
        lambda m, x: m.last(mix(m, m.first(x))).mean(2),
        first=nn.Conv1d(3, 6, 1, bias=False),
        last=nn.Conv1d(6, 4, 1),
        **parts,
    )
    masks = masks_keeping(model, first=[0, 4, 5])
    with pytest.warns(fp.FisherpruneWarning, match=match):
        small = shrunk(model, masks, torch.randn(3, 3, 7), quiet=False)
    assert widths(small)["first"] == 6


def test_a_gate_of_what_is_pruned_goes_along():
    model = Own(
        lambda m, x: m.last((h := m.first(x)) * torch.sigmoid(m.gate(h))),
        first=nn.Linear(3, 6),
        gate=nn.Linear(6, 6),
        last=nn.Linear(6, 2),
    )
    masks = masks_keeping(model, first=[0, 4, 5], gate=[0, 1, 4])
    small = shrunk(model, masks, torch.randn(3, 3))
    assert widths(small) == {"first": 4, "gate": 4, "last": 2}


def test_parameters_of_no_layer():
    model = Own(
        lambda m, x: m.last(torch.relu(m.first(x)) * m.scale),
        first=nn.Linear(3, 6), last=nn.Linear(6, 2),
    )  # fmt: skip
    model.scale = nn.Parameter(torch.randn(6))
    masks = masks_keeping(model, first=[0])
    with pytest.warns(
        fp.FisherpruneWarning, match="a parameter that belongs to no lay"
    ):
        small = shrunk(model, masks, torch.randn(2, 3), quiet=False)
    assert size(small) == size(model)


def test_shared_and_computed_weights():
    twice = Own(
        lambda m, x: m.head(torch.tanh(m.fc(torch.tanh(m.fc(x))))),
        fc=nn.Linear(4, 4), head=nn.Linear(4, 2),
    )  # fmt: skip
    masks, x = masks_keeping(twice, fc=[0, 1]), torch.randn(3, 4)
    assert widths(shrunk(twice, masks, x)) == widths(twice)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    with pytest.warns(fp.FisherpruneWarning, match="'0' shares a parameter with anoth"):
        assert widths(
            shrunk(tied, masks_keeping(tied, _0=[0, 1]), x, quiet=False)
        ) == widths(tied)
    computed = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    masks = masks_keeping(computed, _0=[0, 1])
    nn.utils.parametrizations.weight_norm(computed[2])
    with pytest.warns(fp.FisherpruneWarning, match="'2' computes its weight from othe"):
        assert widths(shrunk(computed, masks, x, quiet=False)) == widths(computed)
