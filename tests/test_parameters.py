"""prunable_parameters: the default choice and the choice by name."""

import copy

import pytest
import torch
from nets import SequenceNet, TwiceNet, conv_net
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fisherprune as fp


def test_default_is_conv_and_linear_weights_without_the_classifier():
    assert list(fp.prunable_parameters(conv_net())) == [
        f"{i}.weight" for i in (0, 3, 5, 7, 9)
    ]
    assert list(fp.prunable_parameters(SequenceNet())) == [
        "conv.weight",
        "embed.weight",
        "mix.weight",
    ]


def test_returns_the_parameters_themselves():
    model = conv_net()
    for name, parameter in fp.prunable_parameters(model).items():
        assert parameter is model.get_parameter(name)


def test_skip_chooses_by_parts_of_names():
    model = TwiceNet()
    chosen = fp.prunable_parameters(model, skip=("bias", "head"))
    assert list(chosen) == ["conv.weight", "bn.weight", "fc.weight"]
    assert list(fp.prunable_parameters(model, skip=())) == [
        name for name, _ in model.named_parameters()
    ]
    assert fp.prunable_parameters(model, skip="bias").keys() == (
        fp.prunable_parameters(model, skip=("bias",)).keys()
    )


def test_tied_weights_are_listed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert list(fp.prunable_parameters(model)) == ["0.weight"]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm2d(3)])
def test_nothing_to_prune_is_an_error(model):
    with pytest.raises(fp.FisherpruneError, match="has no prunable parameters"):
        fp.prunable_parameters(model)
    with pytest.raises(fp.FisherpruneError, match="no prunable parameters among its"):
        fp.prunable_parameters(conv_net(), skip=[""])


def test_one_dimensional_convolutions_count():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 2))
    assert list(fp.prunable_parameters(model)) == ["0.weight"]
    moments = fp.gradient_moments(
        model, [(torch.randn(4, 2, 4), torch.randint(2, (4,)))]
    )
    assert moments.fisher["0.weight"].shape == (3, 2, 3)


def test_reading_the_choice_changes_no_buffer():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.FisherpruneError):
        fp.prunable_parameters(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert fp.prunable_parameters(nn.Sequential(nn.Linear(2, 2), model[0])) != {}


@pytest.mark.parametrize(
    "wrap",
    [weight_norm, spectral_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)],
)
def test_computed_weights_are_not_left_out_silently(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(2, 3, 1)), nn.Flatten(), nn.Linear(3, 2))
    match = (
        r"weight of '0' must be a parameter of that \w*Conv2d, got one computed from "
        r"others: choose yourself, by skip=\(...\) or parameters=\{name: parameter"
    )
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prunable_parameters(model)
    chosen = fp.prunable_parameters(model, skip=("0.parametrizations", "0.weight"))
    x, y = torch.randn(3, 2, 1, 1), torch.tensor([0, 1, 1])
    found = fp.gradient_moments(model, [(x, y)], parameters=chosen)
    assert list(found.mean) == ["0.bias", "2.weight", "2.bias"]


def test_skip_must_be_parts_of_names():
    for skip in (3, [3], ["bias", None]):
        with pytest.raises(fp.FisherpruneError, match="skip must be parts of .*, got "):
            fp.prunable_parameters(conv_net(), skip)


def test_conv3d_weights_are_prunable_and_data_free_criteria_score_them():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 27, 5))
    assert list(fp.prunable_parameters(model)) == ["0.weight"]
    x, y = torch.randn(4, 1, 5, 5, 5), torch.randint(5, (4,))
    masks = fp.prune(model, [(x, y)], "magnitude", 0.5)
    assert masks.kept() == 27
    match = (
        "'0.weight', of Conv3d in Sequential, is used outside of conv1d, conv2d, lin"
    )
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.prune(model, [(x, y)], "fts", 0.5)
