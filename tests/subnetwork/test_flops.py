"""FLOPs against counts by hand."""

import pytest
import torch
from families import mobilenet, residual
from nets import TwiceNet, conv_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fisherprune as fp


def random_masks(model, density=0.4):
    return fp.Masks(
        {
            name: torch.rand(p.shape) < density
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
    )


def kept(masks, name):
    return int(masks[name].sum())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_with_stride_padding_dilation_and_groups(dims, groups):
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    layer = kind(4, 6, 3, stride=2, padding=2, dilation=2, groups=groups)
    masks, samples = random_masks(layer), 3
    x = torch.randn(samples, 4, *[9] * dims)
    positions = layer(x).numel() // 6  # of all samples
    found = fp.flops(layer, x, masks)
    assert found.dense == 2 * positions * layer.weight.numel()
    assert found.masked == 2 * positions * kept(masks, "weight")
    assert found.share == pytest.approx(kept(masks, "weight") / layer.weight.numel())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_layers(shape, bias):
    layer = nn.Linear(5, 7, bias)
    masks = {"weight": torch.rand(7, 5) < 0.5}
    found = fp.flops(layer, torch.randn(2, *shape), masks)
    rows = 2 * torch.Size(shape[:-1]).numel()
    assert found.dense == 2 * rows * 35
    assert found.masked == 2 * rows * kept(masks, "weight")


def test_transposed_convolutions():
    layer = nn.ConvTranspose2d(3, 5, 2, stride=2)
    masks = random_masks(layer)
    found = fp.flops(layer, torch.randn(1, 3, 4, 4), masks)
    assert found.dense == 2 * 16 * layer.weight.numel()
    assert found.masked == 2 * 16 * kept(masks, "weight")


def test_a_layer_counts_each_time_it_is_called():
    model = TwiceNet(groups=2)
    masks = random_masks(model)
    found = fp.flops(model, torch.randn(1, 4, 8, 8), masks)
    calls = {"conv.weight": 64 + 16, "fc.weight": 16 + 1, "head.weight": 1}
    own = dict(model.named_parameters())
    assert found.by_parameter == {
        name: (2 * n * own[name].numel(), 2 * n * kept(masks, name))
        for name, n in calls.items()
    }
    assert found.dense == sum(dense for dense, _ in found.by_parameter.values())
    assert found.masked == sum(masked for _, masked in found.by_parameter.values())


def test_parameters_without_a_mask_count_whole():
    model = conv_net()
    x = torch.randn(1, 3, 9, 9)
    dense = fp.flops(model, x)
    assert dense.masked == dense.dense and dense.share == 1 and not dense.uncounted
    masks = fp.Masks({"0.weight": torch.zeros(6, 3, 3, 3) > 0})
    found = fp.flops(model, x, masks)
    assert dense.dense == found.dense
    assert found.dense - found.masked == 2 * 81 * 6 * 27


@pytest.mark.parametrize("make", [residual, mobilenet])
def test_the_network_whole_is_what_pytorch_counts(make):
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert fp.flops(model, x).dense == counter.get_total_flops()


def test_weights_that_are_zero_by_chance_count():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    assert fp.flops(layer, torch.ones(1, 4), {"weight": torch.eye(4) > 0}).masked == 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.own(x, x, x, need_weights=False)[0]


def test_packed_projections_have_the_density_of_their_parts():
    model, tokens = Attention(), 5
    masks = random_masks(model)
    found = fp.flops(model, torch.randn(1, tokens, 8), masks)
    names = "own.in_proj_weight", "own.out_proj.weight"
    products = 2 * 2 * tokens * tokens * 8  # queries by keys, and these by values
    assert found.dense == 2 * tokens * 4 * 64 + products
    assert found.masked == products + sum(2 * tokens * kept(masks, n) for n in names)


def test_keys_of_another_sequence_use_their_part_of_a_packed_weight():
    layer = nn.MultiheadAttention(4, 1, bias=False)
    masks = {"in_proj_weight": torch.ones(12, 4) > 0}
    masks["in_proj_weight"][:4] = False  # the queries'
    query, key = torch.randn(3, 1, 4), torch.randn(7, 1, 4)
    found = fp.flops(layer, (query, key, key), masks)
    assert found.by_parameter["in_proj_weight"] == (2 * 16 * (3 + 7 + 7), 2 * 16 * 14)


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates):
    model = kind(5, 6, 2)
    masks = random_masks(model)
    found = fp.flops(model, torch.randn(7, 1, 5), masks)
    assert found.dense == 2 * 7 * gates * 6 * (5 + 6 + 6 + 6)
    assert found.masked == 2 * 7 * masks.kept()


def test_weights_computed_from_parameters():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    name = "0.parametrizations.weight.original1"
    masks = {name: torch.rand(6, 4) < 0.7}
    masks[name][:, 0] = True  # no row is empty: its norm would be 0
    found = fp.flops(model, torch.ones(1, 4), masks)
    assert found.dense == 2 * 24 + 2 * 18
    assert found.masked == 2 * kept(masks, name) + 2 * 18


class Odd(nn.Module):
    """Uses a weight as what is not multiplied: ``[4, 4]`` by ``[4, 4]``, in all."""

    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.other = nn.Parameter(torch.randn(4, 4))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (m.other.new_zeros(4, 4) + 1) @ m.weight + x,
        lambda m, x: torch.zeros_like(m.other) @ m.weight + x,
        lambda m, x: m.other.clone().copy_(x) @ m.weight,
        lambda m, x: torch.addmm(m.other, x, m.weight),
        lambda m, x: torch.baddbmm(m.other[None], x[None], m.weight[None]),
        lambda m, x: (m.other * x) @ m.weight,
    ],
)
def test_a_weight_that_is_not_multiplied_does_not_thin_the_product(forward):
    masks = {"weight": torch.eye(4) > 0, "other": torch.zeros(4, 4) > 0}
    masks["other"][0, 1] = True
    found = fp.flops(Odd(forward), torch.eye(4), masks)
    assert (found.dense, found.masked) == (2 * 64, 2 * 16)
    assert found.uncounted == ("other",)


def test_effective_masks_have_flops_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    masks = {"0.weight": torch.ones(3, 3) > 0, "2.weight": torch.eye(3) > 0}
    masks["2.weight"][0] = False
    x = torch.randn(1, 3)
    paths = fp.effective_masks(model, x, masks)
    assert fp.flops(model, x, masks).masked == 2 * (9 + 2)
    assert fp.flops(model, x, paths).masked == 2 * (6 + 2)
