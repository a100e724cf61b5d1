import pytest
import torch
import torch.nn.functional as F

from fisherprune import models
from fisherprune.errors import FieldError
from fisherprune.models.resnet import PaddingShortcut

COUNTS = {
    "resnet18": 11_173_962,
    "resnet20": 269_722,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "resnet152": 58_156_618,
    "lottery_vgg11": 9_231_114,
    "lottery_vgg16": 14_728_266,
    "vgg11": 9_231_114,
    "vgg13": 9_416_010,
    "vgg16": 14_728_266,
    "vgg19": 20_040_522,
}


@pytest.mark.parametrize("name", models.MODELS)
def test_parameter_counts(name):
    with torch.device("meta"):
        network = models.create(name)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name]


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet18", "resnet50", "vgg11", "lottery_vgg16"]
)
@pytest.mark.parametrize("size", [1, 8, 17, 32])
def test_any_image_size_classes_and_channels(name, size):
    network = models.create(name, num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 1, size, size)).shape == (2, 7)


def test_names_that_filters_rely_on():
    with torch.device("meta"):
        resnet = dict(models.resnet50().named_parameters())
        vgg = dict(models.vgg11().named_parameters())
    assert resnet["layer1.0.shortcut.0.weight"].shape == (256, 64, 1, 1)
    assert resnet["layer1.0.shortcut.1.weight"].shape == (256,)
    for name, parameter in {**resnet, **vgg}.items():
        norm = "bn" in name or "shortcut.1" in name
        if name.endswith("weight"):
            assert norm == (parameter.dim() == 1), name
        else:
            assert norm or name == "linear.bias" or name.startswith("features.conv")
    assert vgg["linear.weight"].shape == (10, 512)


def test_feature_maps_halve_from_the_second_layer_on():
    network = models.resnet20(in_channels=1).eval()
    sizes = []
    for layer in (network.layer1, network.layer2, network.layer3):
        layer.register_forward_hook(lambda *a: sizes.append(tuple(a[2].shape[1:])))
    network(torch.rand(1, 1, 32, 32))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_a_lottery_vgg_averages_what_the_others_pool():
    with torch.device("meta"):
        lottery = models.lottery_vgg11(7, 1)
        names = {n: p.shape for n, p in models.vgg11(7, 1).named_parameters()}
    assert {n: p.shape for n, p in lottery.named_parameters()} == names
    lottery = models.lottery_vgg11(7, 1).eval()
    x = images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        for i in range(1, 9):
            conv = lottery.get_submodule(f"features.conv{i}")
            x = F.conv2d(x, conv.weight, conv.bias, padding=1)
            x = F.relu(lottery.get_submodule(f"features.bn{i}")(x))
            if i in (1, 2, 4, 6):
                x = F.max_pool2d(x, 2)
        logits = F.linear(F.avg_pool2d(x, 2).flatten(1), *lottery.linear.parameters())
        torch.testing.assert_close(lottery(images), logits)


def test_padding_shortcut_keeps_every_other_pixel_between_zeros():
    x = torch.rand(2, 4, 5, 5)
    y = PaddingShortcut(4, 8, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert torch.equal(y[:, [0, 1, 6, 7]], torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize(
    "name, got",
    [
        ("resnet19", r"'resnet19' \(did you mean resnet18\?\)"),
        ("torchvision:resnet5", r".* \(did you mean torchvision:resnet50\?\)"),
        ("mlp", "'mlp'"),
        ("net.py", "'net.py'"),
        ("a b:net", "'a b:net'"),
        ("net.py:", "'net.py:'"),
        ("", "''"),
    ],
)
def test_a_name_that_can_be_no_network(name, got):
    words = (
        "model must be one of resnet18, .*, vgg19, torchvision:NAME, MODULE:FUNCTION "
        f"or FILE.py:FUNCTION, got {got}"
    )
    for check in (models.check_name, models.create):
        with pytest.raises(FieldError, match=f"^{words}$"):
            check(name)


@pytest.mark.parametrize("name", ["vgg11", "torchvision:vgg11", "a.b:c", "/a.py:c"])
def test_names_are_checked_without_their_files(name):
    models.check_name(name)
