"""Moments of layers that are used several times, or not at all."""

import pytest
import torch
import truth
from checks import assert_moments
from nets import Mixing, batches, data
from torch import nn

import fisherprune as fp


def test_parameters_not_reached_have_zero_moments():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    model, (x, y) = Idle(), data((4,))
    found = fp.gradient_moments(
        model, [(x, y)], parameters=dict(model.named_parameters())
    )
    assert not found.fisher["idle.weight"].any()
    assert found.fisher["used.weight"].any()


def test_tied_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    model, (x, y) = Shared(), data((6,))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters)
    found = fp.gradient_moments(model, batches(x, y, 4), parameters=parameters)
    assert_moments(found, expected)


class LongAlone(Mixing):
    """A layer that only long sequences pass; inputs [N, T, 4]."""

    def forward(self, x):
        return self.head((self.fc(x) if x.shape[1] > 3 else x).mean(1))


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "sizes",
    [[(5, 5), (5, 2), (5, 5)], [(3, 5), (4, 2), (4, 5)], [(3, 5), (1, 2), (4, 5)]]
    + [[(2, 2), (3, 5), (1, 2)], [(5, 5), (5, 2)], [(3, 5), (1, 2), (1, 2), (1, 2)]],
)
def test_a_parameter_that_some_batches_do_not_use(sizes, group_size):
    model = LongAlone(None)
    data = [(torch.randn(n, t, 4), torch.randint(5, (n,))) for n, t in sizes]
    parameters = dict(model.named_parameters())
    expected = truth.moments_of_batches(model, data, parameters, group_size)
    found = fp.gradient_moments(
        model, data, group_size=group_size, parameters=parameters
    )
    assert_moments(found, expected)


class Recurrent(nn.Module):
    """Uses a convolution and a Linear layer many times; inputs [N, 3, 5, 5]."""

    def __init__(self, uses, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, groups=groups)
        self.fc, self.head, self.uses = nn.Linear(3, 3), nn.Linear(3, 5), uses

    def forward(self, x):
        for _ in range(self.uses):
            x = torch.tanh(self.conv(x))
        x = x.mean((2, 3))
        for _ in range(self.uses):
            x = torch.tanh(self.fc(x))
        return self.head(x)


@pytest.mark.parametrize("joined_bytes", [1, 32 << 20])
@pytest.mark.parametrize("uses, groups, group_size", [(3, 1, 1), (5, 3, 2), (4, 1, 13)])
def test_many_uses_of_a_layer(uses, groups, group_size, joined_bytes, monkeypatch):
    # By the smaller number of bytes, every group is joined by itself.
    monkeypatch.setattr("fisherprune.persample.factors.STREAM_BYTES", joined_bytes)
    model, (x, y) = Recurrent(uses, groups), data((3, 5, 5))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, group_size)
    for size in (5, 13):
        found = fp.gradient_moments(
            model, batches(x, y, size), group_size=group_size, parameters=parameters
        )
        assert_moments(found, expected)


class Strided(nn.Module):
    """Uses convolutions of any geometry several times; inputs [N, 4, 9, 8]."""

    def __init__(self, kernel, one_dimensional=False, **options):
        super().__init__()
        self.rows = one_dimensional
        kind = nn.Conv1d if one_dimensional else nn.Conv2d
        self.conv = kind(4, 6, kernel, **options)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = x.flatten(2) if self.rows else x
        seen = [torch.tanh(self.conv(x * scale)) for scale in (1.0, -0.7, 0.4)]
        return self.head(sum(h.flatten(2).square().sum(2) for h in seen))


GEOMETRIES = [
    {"kernel": 3, "stride": 2, "padding": 1},
    {"kernel": (4, 2), "stride": (3, 1), "padding": (2, 0), "groups": 2},
    {"kernel": (2, 3), "stride": (3, 2), "dilation": (3, 2), "padding": (0, 2)},
    {"kernel": (1, 1), "stride": (2, 2)},
    {"kernel": (9, 8)},
    {"kernel": (3, 3), "stride": (5, 4), "padding": (3, 1), "groups": 2},
    {"kernel": 5, "one_dimensional": True, "stride": 3, "padding": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("group_size", [1, 4])
def test_three_uses_of_a_convolution_of_any_geometry(geometry, group_size):
    model, (x, y) = Strided(**geometry), data((4, 9, 8))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, group_size)
    found = fp.gradient_moments(
        model, [(x, y)], group_size=group_size, parameters=parameters
    )
    assert_moments(found, expected)


def test_many_uses_of_a_convolution_are_not_unfolded(monkeypatch):
    def unfold(*_, **__):
        raise AssertionError("patches were made")

    monkeypatch.setattr(nn.functional, "unfold", unfold)
    model, (x, y) = Recurrent(20), data((3, 5, 5))
    fp.gradient_moments(model, [(x, y)])
