"""Initial weights: their distribution, and what they depend on."""

import pytest
import torch
from torch import nn

from fisherprune import models
from fisherprune.errors import FieldError

MODES = {"kaiming_normal": 1, "kaiming_normal_fan_out": 0}
"""The dimension of a weight that its fan counts."""


def fan(weight, dimension):
    return weight.shape[dimension] * weight[0, 0].numel()


def layers(network, kind):
    return [m for m in network.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("init", MODES)
@pytest.mark.parametrize("name", ["lottery_vgg11", "resnet20"])
def test_the_variance_of_each_weight_is_two_over_its_fan(name, init):
    network = models.create(name, init=init)
    kinds = (nn.Conv2d, nn.Linear) if init == "kaiming_normal" else nn.Conv2d
    for layer in layers(network, kinds):
        weight = layer.weight.detach().double()
        scaled = weight * (fan(weight, MODES[init]) / 2) ** 0.5  # standard normal
        n = scaled.numel()
        assert abs(scaled.mean()) < 6 / n**0.5
        assert abs(scaled.var() - 1) < 6 * (2 / n) ** 0.5
        assert abs((scaled**4).mean() - 3) < 6 * (96 / n) ** 0.5
        assert layer.bias is None or not layer.bias.any()


def test_what_an_init_leaves_is_the_networks_own():
    own = models.create("resnet20", seed=3).state_dict()
    convolutions = {name for name, value in own.items() if value.dim() == 4}
    for init, drawn in (
        ("default", set()),
        ("kaiming_normal", {*convolutions, "linear.weight", "linear.bias"}),
        ("kaiming_normal_fan_out", convolutions),
    ):
        network = models.create("resnet20", init=init, seed=3).state_dict()
        assert {n for n in own if not torch.equal(own[n], network[n])} == drawn


@pytest.mark.parametrize("init", models.INITS)
def test_weights_depend_on_the_seed_alone(init):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = models.create("resnet20", init=init, seed=1).conv1.weight
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again = models.create("resnet20", init=init, seed=1).conv1.weight
    other = models.create("resnet20", init=init, seed=2).conv1.weight
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_generator_is_the_only_source_of_chance():
    network = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Linear(4, 5, bias=False))
    drawn = []
    for _ in range(2):
        before = torch.get_rng_state()
        models.initialize_(network, "kaiming_normal", torch.Generator().manual_seed(7))
        assert torch.equal(before, torch.get_rng_state())
        drawn.append([p.detach().clone() for p in network.parameters()])
    assert all(map(torch.equal, *drawn))


def test_an_init_that_is_none():
    message = r"^init must be one of default, kaiming_normal, kaiming_normal_fan_out, "
    message += r"got 'kaiming_norma' \(did you mean kaiming_normal\?\)$"
    with pytest.raises(FieldError, match=message):
        models.create("resnet20", init="kaiming_norma")
    with pytest.raises(FieldError, match=message):
        models.initialize_(nn.Linear(2, 2), "kaiming_norma")
