"""Models without the channels that masks prune: the same outputs, smaller."""

import copy

import pytest
import torch
import torchvision
from channel_masks import (
    masks_keeping,
    random_channels,
    shrunk,
    size,
    widths,
)
from nets import Own, conv_net, randomized
from torch import nn

import fisherprune as fp

pytest.importorskip("torch_pruning")


def small_classifier():
    """Return torchvision's VGG with few units behind its flattened images."""
    net = torchvision.models.vgg11_bn(num_classes=5)
    net.classifier = nn.Sequential(
        nn.Linear(512 * 49, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5)
    )
    return net


NETWORKS = {
    "resnet18": lambda: fp.models.resnet18(num_classes=5),
    "resnet20": lambda: fp.models.resnet20(num_classes=5),
    "resnet50": lambda: fp.models.resnet50(num_classes=5),
    "vgg11": lambda: fp.models.vgg11(num_classes=5),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision vgg11_bn": small_classifier,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, trained):
    model = NETWORKS[name]()
    if trained:
        randomized(model)
    masks, x = random_channels(model), torch.randn(2, 3, 32, 32)
    small = shrunk(model, masks, x)
    assert size(small) < 0.7 * size(model)
    dense = fp.flops(model, x).dense
    assert fp.flops(small, x.double()).dense < 0.75 * dense
    assert {n: type(m) for n, m in small.named_modules()} == {
        n: type(m) for n, m in model.named_modules()
    }


def test_a_network_of_many_kinds_of_layers():
    model = conv_net()
    for _ in range(5):
        randomized(model)
        shrunk(model, random_channels(model, 0.6), torch.randn(3, 3, 9, 9))


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(),
        nn.Linear(7, 3),
    )  # fmt: skip


def test_an_mlp_is_the_one_of_the_kept_units(recwarn):
    """Against a network that is built by hand, its biases too."""
    model = randomized(mlp()).double().eval()
    kept, other = [0, 3, 4], [1, 5]
    masks = masks_keeping(model, _0=kept, _3=other)
    small = shrunk(model, masks, torch.randn(4, 6), quiet=False)
    assert not [w for w in recwarn if issubclass(w.category, fp.FisherpruneWarning)]
    assert widths(small) == {"0": 3, "3": 2, "5": 3}
    assert size(small) == 6 * 3 + 3 + 2 * 3 + 3 * 2 + 2 + 2 * 3 + 3
    gone = [i for i in range(8) if i not in kept]
    norm = copy.deepcopy(model[1])
    constant = torch.tanh(norm(model[0].bias.expand(2, -1)))[0].detach()
    bias = model[3].bias + model[3].weight[:, gone] @ constant[gone]
    torch.testing.assert_close(small[3].bias, bias[other])
    assert torch.equal(small[0].weight, model[0].weight[kept])
    assert torch.equal(small[1].running_var, model[1].running_var[kept])
    assert torch.equal(small[3].weight, model[3].weight[other][:, kept])


def convolutions(**options):
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.Sigmoid(),
            nn.Conv2d(6, 4, **options),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": "valid", "bias": False},
        {"kernel_size": 1, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "dilation": 2},
    ],
)
def test_constants_become_biases(options):
    model, x = convolutions(**options), torch.randn(2, 2, 8, 8)
    model(x)
    masks = masks_keeping(model, _0=[1, 4])
    small = shrunk(model, masks, x, quiet=False)
    assert widths(small)["0"] == 2
    assert small[3].bias is not None


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "padding": (0, 2), "stride": 2, "bias": False},
        {"kernel_size": 2, "padding": "same"},
    ],
)
def test_one_channel_carries_constants_beside_zeros(options):
    model, x = convolutions(**options), torch.randn(2, 2, 8, 8)
    model(x)
    masks = masks_keeping(model, _0=[1, 4])
    match = "1 of 4 of '0' .carries the constants of others, which are no bias"
    with pytest.warns(fp.FisherpruneWarning, match=match):
        small = shrunk(model, masks, x, quiet=False)
    assert widths(small)["0"] == 3
    assert (small[3].bias is None) == (model[3].bias is None)


def test_zeros_need_no_carrier(recwarn):
    model, x = convolutions(kernel_size=3, padding=1), torch.randn(2, 2, 8, 8)
    model[2] = nn.ReLU()
    model(x)
    nn.init.constant_(model[1].bias, 0.0)
    nn.init.constant_(model[1].running_mean, 0.5)
    small = shrunk(model, masks_keeping(model, _0=[0, 5]), x, quiet=False)
    assert widths(small)["0"] == 2
    assert torch.equal(small[3].bias, model[3].bias.double())


def test_layers_of_other_dimensions():
    """Transposed ones, whose borders see less, and Conv1d and Conv3d."""
    for kinds, shape in (
        ((nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d), (3, 9)),
        ((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d), (3, 4, 4, 4)),
        ((nn.ConvTranspose2d, nn.ConvTranspose2d, nn.BatchNorm2d), (3, 5, 5)),
    ):
        one, two, norm = kinds
        model = randomized(
            nn.Sequential(
                one(3, 6, 2), norm(6), nn.ELU(), two(6, 5, 3, 2, padding=1), nn.ELU(),
                one(5, 4, 2), nn.AdaptiveAvgPool2d(1) if len(shape) == 3 else norm(4),
            )
        )  # fmt: skip
        masks = masks_keeping(model, _0=[1, 2], _3=[0, 3])
        small = shrunk(model, masks, torch.randn(2, *shape))
        assert [*widths(small).values()][:2] == [3, 2 + (one is two)]


def test_depthwise_convolutions_take_along_what_they_read():
    """One that is pruned, and one whose input is."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.ReLU6(),
        nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    masks = masks_keeping(model, _0=[0, 1, 2, 3], _2=[0, 1, 4])
    small = shrunk(model, masks, torch.randn(2, 3, 5, 5), quiet=False)
    assert widths(small) == {"0": 2, "2": 2, "4": 4}
    assert small[2].groups == 2
    first = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 2, 1))
    masks = masks_keeping(first, _0=[1])  # its inputs are the model's
    small = shrunk(first, masks, torch.randn(2, 3, 5, 5))
    assert widths(small) == widths(first)


def test_convolutions_with_groups():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=2),
        nn.ReLU(), nn.Conv2d(12, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    inputs = masks_keeping(model, _0=[0, 2, 3, 4, 5])  # gone: 1; 6 and 7
    assert widths(shrunk(model, inputs, x))["0"] == 8
    inputs = masks_keeping(model, _0=[0, 2, 4, 6, 7])  # gone: 1, 3; 5
    small = shrunk(model, inputs, x)
    assert widths(small)["0"] == 6 and small[2].weight.shape == (12, 3, 1, 1)
    outputs = masks_keeping(model, _2=[0, 1, 2, 3, 6, 9])  # gone: 4, 5; 7, 8, 10, 11
    small = shrunk(model, outputs, x)
    assert widths(small)["2"] == 8 and small[2].groups == 2
    with pytest.warns(
        fp.FisherpruneWarning, match="2 of 6 of '2' .other groups of '2'"
    ):
        shrunk(model, outputs, x, quiet=False)
    every = masks_keeping(model, _0=[], _2=[])
    assert widths(shrunk(model, every, x)) == {"0": 2, "2": 2, "4": 4}


def test_constants_beside_zeros_in_groups_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1, groups=2)
    )
    masks = masks_keeping(model, _0=[0, 4])
    with pytest.warns(fp.FisherpruneWarning, match="'2' has groups, and pads constan"):
        small = shrunk(model, masks, torch.randn(2, 3, 5, 5), quiet=False)
    assert size(small) == size(model)


def test_flattened_images_with_other_constants_at_each_place():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Flatten(),
        nn.Linear(5 * 16, 4),
    )  # fmt: skip
    masks = masks_keeping(model, _0=[0, 1], _1=[0, 2, 3, 4])
    small = shrunk(model, masks, torch.randn(2, 3, 6, 6), quiet=False)
    assert small[3].in_features == 2 * 16 - 16
    assert widths(small) == {"0": 1, "1": 1, "3": 4}


def test_joined_and_divided_channels():
    def run(m, x):
        both = torch.cat([m.one(x), m.two(x)], 1)
        left, right = m.mixed(torch.relu(both)).chunk(2, 1)
        return m.left(torch.relu(left)) + m.right(torch.sigmoid(right))

    model = Own(
        run, one=nn.Linear(4, 5), two=nn.Linear(4, 3), mixed=nn.Linear(8, 8),
        left=nn.Linear(4, 2), right=nn.Linear(4, 2),
    )  # fmt: skip
    masks = masks_keeping(model, one=[0, 2], two=[1, 2])
    small = shrunk(model, masks, torch.randn(5, 4), quiet=False)
    assert widths(small) == {"one": 2, "two": 2, "mixed": 8, "left": 2, "right": 2}
    # Torch-Pruning takes the parts of this division for each other.
    shrunk(model, masks_keeping(model, mixed=[0, 1, 2, 4, 5]), torch.randn(5, 4))


def test_layers_that_run_twice_alike():
    model = Own(
        lambda m, x: m.last(torch.relu(m.one(x[:, :3]))) - m.last(
            torch.relu(m.one(x[:, 3:]))
        ),
        one=nn.Linear(3, 5), last=nn.Linear(5, 2),
    )  # fmt: skip
    small = shrunk(model, masks_keeping(model, one=[1, 2]), torch.randn(4, 6))
    assert widths(small) == {"one": 2, "last": 2}


def test_channels_that_no_kept_weight_reads():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
    columns = torch.rand(5, 6) < 2
    columns[:, [1, 3]] = False
    columns[4] = False
    masks = fp.Masks({"2.weight": columns})
    small = shrunk(model, masks, torch.randn(3, 4), quiet=False)
    assert widths(small) == {"0": 4, "2": 4, "3": 2}


def test_masks_of_scales_and_biases():
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                      nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )  # fmt: skip
    scale = torch.tensor([1, 0, 1, 1, 0, 1]) > 0
    masks = fp.Masks({"1.weight": scale, "1.bias": scale})
    small = shrunk(model, masks, torch.randn(2, 3, 7, 7), quiet=False)
    assert widths(small)["0"] == 4
    assert torch.equal(small[3].bias, model[3].bias.double())
