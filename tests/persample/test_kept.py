"""What a BatchNorm computes once for a pass, and what makes it compute anew."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherprune as fp


@torch.no_grad()
def filled(tensor, value):
    return tensor.fill_(value)


class Changing(nn.Module):
    """BatchNorm with other tensors or numbers in each batch, as its images say."""

    def __init__(self, change):
        super().__init__()
        self.before, self.after = nn.Conv1d(2, 6, 1), nn.Linear(18, 5)
        self.weight = nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 1)
        self.register_buffer("other", torch.rand(6) + 2)
        self.change = change

    def forward(self, x):
        of = self.change(self, int(x[0, 0, 0]))
        of = {"var": self.var, "weight": self.weight, "eps": 0.1} | of
        stats = self.mean, of["var"]
        h = F.batch_norm(self.before(x), *stats, of["weight"], eps=of["eps"])
        return self.after(h.flatten(1))


CHANGES = {
    "nothing": lambda own, kind: {},
    "variance in place": lambda own, kind: {"var": filled(own.var, kind)},
    "another variance": lambda own, kind: {"var": own.var if kind == 1 else own.other},
    "a new variance": lambda own, kind: {"var": own.var + kind},
    "weight in place": lambda own, kind: {"weight": filled(own.weight, kind)},
    "another weight": lambda own, kind: {
        "weight": [own.weight, own.other, None][kind - 1]
    },
    "a computed weight": lambda own, kind: {"weight": own.weight * kind},
    "eps": lambda own, kind: {"eps": kind},
}


def batches_of_kinds(*kinds):
    batches = []
    for kind in kinds:
        x = torch.randn(3, 2, 3)
        x[:, 0] = kind
        batches.append((x, torch.randint(5, (3,))))
    return batches


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_batches_is_computed_anew(change):
    model, batches = Changing(CHANGES[change]), batches_of_kinds(1, 2, 3, 1)
    watched = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name != "weight"
    }
    found = fp.gradient_moments(model, batches, parameters=watched)
    assert_moments(found, truth.moments_of_batches(model, batches, watched, 1))


def test_every_pass_computes_anew():
    """What changes ``tensor.data`` changes no version."""
    model, batches = Changing(CHANGES["nothing"]), batches_of_kinds(1, 2)
    watched = {"before.weight": model.before.weight, "weight": model.weight}
    for _ in range(2):
        found = fp.gradient_moments(model, batches, parameters=watched)
        assert_moments(found, truth.moments_of_batches(model, batches, watched, 1))
        model.var.data.mul_(4)
        model.weight.data.mul_(-2)


def test_statistics_of_the_inference_mode():
    """They count no versions; autograd alone, by which a batch is checked, fails."""
    model = Changing(CHANGES["nothing"])
    batches = [(x[:1], y[:1]) for x, y in batches_of_kinds(1, 2)]
    with torch.inference_mode():
        model.var = torch.rand(6) + 1
    watched = {"before.weight": model.before.weight}
    found = fp.gradient_moments(model, batches, parameters=watched)
    assert_moments(found, truth.moments_of_batches(model, batches, watched, 1))


class Calls(TorchDispatchMode):
    """Counts functions."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_a_scale_is_computed_once():
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(16, 5)),
    )
    batches = [(torch.randn(n, 2, 6, 6), torch.arange(n) % 5) for n in (4, 4, 2)]
    with Calls() as calls:
        fp.gradient_moments(model, batches)
    assert calls.found["rsqrt"] == 2


@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
def test_what_changes_a_result_in_place_before_it_is_read():
    """The run of one sample keeps what a layer gave until the next one reads it."""
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2)
    model = nn.Sequential(*layers, nn.Hardtanh(inplace=True), nn.Flatten())
    model.append(nn.Linear(16, 5))
    batches = [(torch.randn(3, 2, 5, 5), torch.randint(5, (3,))) for _ in range(2)]
    named = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches, F.cross_entropy, parameters=named)
    assert found.paths["0.weight"] == found.paths["2.weight"] == ("conv2d",)
    assert_moments(found, truth.moments_of_batches(model, batches, named, 1))
