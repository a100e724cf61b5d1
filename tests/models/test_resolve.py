"""Networks of torchvision's, and of the user's own functions."""

import hashlib
import sys

import pytest
import torch
from torch import nn

from fisherprune import models
from fisherprune.errors import FieldError, FisherpruneError

NET = """
from torch import nn
import width

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width.WIDTH, 3)
        self.norm = nn.BatchNorm2d(width.WIDTH)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(width.WIDTH, num_classes)

    def forward(self, x):
        return self.linear(self.drop(self.norm(self.conv(x)).mean((2, 3))))

def net(num_classes, in_channels):
    return Net(num_classes, in_channels)

def sized(**sizes):
    pixels = sizes["in_channels"] * sizes["image_size"] ** 2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, sizes["num_classes"]))

def lazy(*, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def unsized(width):
    return Net(10)

def number(num_classes):
    return num_classes

def broken(num_classes):
    return 1 // 0

def fixed(num_classes):
    return Net(num_classes, 3)

class Aux(Net):
    def forward(self, x):
        out = super().forward(x)
        return (out, out) if self.training else out

def ten(num_classes):
    return Net(10)

not_a_function = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Go to a folder with a file of networks, alone and in a package."""
    for folder in (tmp_path / "files", tmp_path / "packed_nets"):
        folder.mkdir()
        (folder / "nets.py").write_text(NET)
    (tmp_path / "files" / "width.py").write_text("WIDTH = 5")
    (tmp_path / "width.py").write_text("WIDTH = 5")
    (tmp_path / "packed_nets" / "other.py").write_text("from .nets import net")
    (tmp_path / "packed_nets" / "wrong.py").write_text("from torch import nonsense")
    (tmp_path / "files" / "wrong.py").write_text("def net(:")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("width", "packed_nets", "packed_nets.nets", "packed_nets.other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("where", ["files/nets.py", "packed_nets.nets"])
@pytest.mark.parametrize("function", ["net", "Net", "sized"])
def test_a_users_function_builds_a_network(place, where, function):
    path = list(sys.path)
    network = models.create(f"{where}:{function}", 7, 1, image_size=6, seed=3)
    assert network.training and network(torch.rand(4, 1, 6, 6)).shape == (4, 7)
    assert sys.path == path


@pytest.mark.parametrize(
    "name", ["resnet20", "files/nets.py:net", "torchvision:mobilenet_v3_small"]
)
def test_the_seed_decides_the_weights_and_nothing_else_changes(place, name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (models.create(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    weights = [next(network.parameters()) for network in (first, other)]
    assert not torch.equal(*weights)
    fresh = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    for key, value in first.state_dict().items():
        if (kind := key.rpartition(".")[2]) in fresh:
            assert (value == fresh[kind]).all()


def test_a_function_draws_the_weights_right_after_the_seed(place):
    network = models.create("files/nets.py:sized", 7, 1, image_size=6, seed=3)
    torch.manual_seed(3)
    assert torch.equal(network[1].weight, nn.Linear(36, 7).weight)


def test_to_try_a_network_draws_no_random_numbers(place):
    torch.manual_seed(3)
    network = models.create("files/nets.py:net")  # it has dropout
    after = torch.get_rng_state()
    torch.manual_seed(3)
    type(network)(10)
    assert torch.equal(torch.get_rng_state(), after)


def test_lazy_layers_are_made(place):
    network = models.create("files/nets.py:lazy", 7, 1, image_size=6, seed=3)
    assert network[1].weight.shape == (7, 36)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "files/nets.py:nett",
            r"must be a function of files/nets.py, got files/nets.py:nett "
            r"\(did you mean net\?\)",
        ),
        ("packed_nets.nets:not_a_function", "must be a function of packed_nets.nets, "),
        (
            "files/none.py:net",
            "must be a function that can be imported, got files/none.py:net: FileNot",
        ),
        (
            "no_such_module:net",
            "must be a function that can be imported, got no_such_module:net: "
            "ModuleNotFoundError: No module named 'no_such_module'$",
        ),
        (
            "packed_nets.wrong:net",
            r"ImportError: cannot import name 'nonsense' .*wrong.py, line 1\)$",
        ),
        ("files/wrong.py:net", r"SyntaxError: .*wrong.py, line 1\)$"),
        (
            "files/nets.py:unsized",
            "must be a function with the keyword arguments num_classes, and as far as "
            r"it uses them in_channels and image_size, got files/nets.py:unsized\(wid",
        ),
        (
            "files/nets.py:number",
            "must be a function that returns a torch.nn.Module, got "
            "files/nets.py:number, which returned 10",
        ),
        (
            "files/nets.py:broken",
            r"files/nets.py:broken raised ZeroDivisionError: .*nets.py, line \d+\)$",
        ),
        (
            "files/nets.py:Aux",
            r"files/nets.py:Aux must map images \[2, 3, 32, 32\] to a tensor of logits "
            r"\[2, 10\], got tuple$",
        ),
        (
            "torchvision:alexnet",
            r"torchvision:alexnet must map images \[2, 3, 32, 32\] .*; it raised Runti",
        ),
        ("torchvision:vit_b_16", None),
        ("torchvision:googlenet", None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_mistake_is_one_line(place, name, message):
    if message is None:
        assert models.create(name)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        return
    with pytest.raises(FisherpruneError, match=f"model .*{message}") as caught:
        models.create(name)
    assert "\n" not in str(caught.value)


def test_a_network_for_other_data_is_refused(place):
    with pytest.raises(FisherpruneError, match=r"\[2, 5\], got \[2, 10\]$"):
        models.create("files/nets.py:ten", 5)
    with pytest.raises(
        FisherpruneError, match="fixed must map images .* it raised Run"
    ):
        models.create("files/nets.py:fixed", 5, 1)
    wanted = "a network for images of 1 channels; torchvision's take 3"
    with pytest.raises(FieldError, match=f"model must be {wanted}, got torchvision:re"):
        models.create("torchvision:resnet18", 5, 1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision(name):
    network = models.create(f"torchvision:{name}", 7, seed=0)
    assert type(network).__module__.startswith("torchvision.models.")
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_the_hash_is_that_of_the_file_that_defines_the_function(place):
    digest = hashlib.sha256(NET.encode()).hexdigest()[:16]
    for where in ("files/nets.py:net", "files/nets.py:Net", "packed_nets.other:net"):
        assert models.source_hash(where) == digest
    (place / "files" / "nets.py").write_text(f"{NET}\n")
    assert models.source_hash("files/nets.py:net") not in (digest, None)
    assert models.source_hash("resnet18") is None
    assert models.source_hash("torchvision:resnet18") is None
    with pytest.raises(FieldError, match="must be a function of packed_nets.nets"):
        models.source_hash("packed_nets.nets:nonet")


def test_a_file_that_changed_is_read_again(place):
    assert models.create("files/nets.py:net").conv.out_channels == 5
    text = NET.replace("width.WIDTH", "6")
    (place / "files" / "nets.py").write_text(text)
    assert models.create("files/nets.py:net").conv.out_channels == 6
