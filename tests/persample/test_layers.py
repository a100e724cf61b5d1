"""Kinds of layers: those of the package, and one of one's own."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from layer_calls import TOKENS, drawn, read
from nets import Mixing, batches, data
from torch import nn
from torch.overrides import wrap_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

import fisherprune as fp
from fisherprune.persample import LayerCall, Rows
from fisherprune.persample import registry as base
from fisherprune.persample.layers import conv
from fisherprune.persample.meeting import RULES


@pytest.fixture
def registry():
    """Forget in the end what a test registers."""
    before = dict(base.CALLS)
    yield
    base.CALLS.clear()
    base.CALLS.update(before)


@wrap_torch_function(lambda input, weight, shift=None: (input, weight))
def scaled(input, weight, shift=None):
    """Multiply the features by a weight each: ``[N, *, features]``."""
    return input * weight if shift is None else input * weight + shift


@dataclass(frozen=True)
class Scaling:
    """``scaled`` over any positions."""

    def forward(self, input, weight, bias):
        return input * weight if bias is None else input * weight + bias

    def input_grad(self, grad, input, weight):
        return grad * weight

    def weight_grads(self, grad, input, shape):
        return Rows((grad * input).flatten(1, -2).sum(1))

    def bias_grads(self, grad):
        return Rows(grad.flatten(1, -2).sum(1))


class Scaled(Mixing):
    """Scales the same features twice, at all positions; inputs [N, T, 4]."""

    def __init__(self):
        super().__init__(None)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = torch.tanh(scaled(self.fc(x), self.scale, shift=self.shift))
        return self.head(scaled(h, self.scale).mean(1))


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_layer_of_ones_own(group_size, registry):
    model, (x, y) = Scaled(), data((3, 4))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, group_size)
    options = {"parameters": parameters, "group_size": group_size}
    without = fp.gradient_moments(model, batches(x, y, 5), **options)
    assert_moments(without, expected)
    assert without.paths["scale"] == ("vmap",)

    @fp.register_layer(scaled)
    def sort_out(input, weight, shift=None):
        return LayerCall(Scaling(), input, weight, shift, reads_input=False)

    found = fp.gradient_moments(model, batches(x, y, 5), **options)
    assert_moments(found, expected)
    assert found.paths["scale"] == ("scaled",)
    diagonal = fp.gauss_newton_diagonal(model, [(x, y)], parameters=parameters)
    for name, wanted in truth.gauss_newton_diagonal(model, x, parameters).items():
        assert truth.relative_error(diagonal[name], wanted) < 1e-4, name
    rest = {"fc.weight": model.fc.weight}
    assert_moments(
        fp.gradient_moments(model, [(x, y)], parameters=rest, group_size=group_size),
        {"fc.weight": expected["fc.weight"]},
    )


@wrap_torch_function(lambda input, weight: (input, weight))
def bent(input, weight):
    """Return tanh(input * weight): input [N, *, F], weight [F]."""
    return torch.tanh(input * weight)


class Bent(nn.Module):
    def __init__(self, in_place=True):
        super().__init__()
        self.before, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.fc, self.in_place = nn.Linear(4, 5), in_place

    def forward(self, x):
        h = bent(self.before(x), self.weight)
        return self.fc(h.mul_(3) if self.in_place else h * 3)


def test_what_a_function_saved_may_be_changed_in_place():
    """Autograd alone refuses that: the backward pass of tanh reads its result."""
    model, plain, (x, y) = Bent(), Bent(in_place=False), data((4,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.cross_entropy(model(x), y).backward()
    plain.load_state_dict(model.state_dict())
    expected = truth.moments(plain, x, y, dict(plain.named_parameters()))

    @fp.register_gradients(bent, positions=False)
    def gradients(grad, input, weight):
        slope = 1 - torch.tanh(input * weight).square()
        return {"weight": Rows(grad * slope * input)}

    try:
        parameters = dict(model.named_parameters())
        found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    finally:
        RULES.pop(bent)
    assert found.paths["weight"] == ("bent",)
    assert_moments(found, expected)


@dataclass(frozen=True)
class Distances:
    """cdist: how far features are from centers, ``[N, in] -> [N, out]``."""

    centers: torch.Tensor

    def forward(self, input, weight, bias):
        return torch.cdist(input, weight)

    def directions(self, input):
        difference = input.unsqueeze(1) - self.centers
        return difference / difference.norm(dim=2, keepdim=True)

    def input_grad(self, grad, input, weight):
        return (grad.unsqueeze(2) * self.directions(input)).sum(1)

    def weight_grads(self, grad, input, shape):
        return Rows(-grad.unsqueeze(2) * self.directions(input))


class Prototypes(nn.Module):
    def __init__(self, features, count):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, features))

    def forward(self, x):
        return torch.cdist(x, self.weight)


def test_a_function_of_torch_that_was_registered_is_scored(registry):
    @fp.register_layer(torch.cdist)
    def sort_out(x1, x2, p=2.0, compute_mode=None):
        return LayerCall(Distances(x2.detach()), x1, x2, None, dims=2, weight_dims=2)

    net = nn.Sequential(nn.Linear(4, 6), Prototypes(6, 7), nn.Tanh(), Prototypes(7, 5))
    model, (x, y) = nn.Sequential(net, nn.Linear(5, 5)), data((4,))
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))
    chosen = fp.prunable_parameters(model, modules=(Prototypes,))
    scores = fp.score(model, [(x, y)], "fts", parameters=chosen)
    assert scores.keys() == {"0.1.weight", "0.3.weight"}


def test_a_function_is_registered_once(registry):
    match = "function must be one that is not registered yet, got linear"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.register_layer(F.linear)


class Backwards(TorchDispatchMode):
    """Counts the backward passes of convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution_backward.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("bytes_at_once", [1, 1000, 2000])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
def test_input_gradients_do_not_depend_on_how_many_samples_are_taken_at_a_time(
    bytes_at_once, memory_format, monkeypatch
):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 3, dilation=2),
        nn.Flatten(),
        nn.Linear(20, 5),
    ).to(memory_format=memory_format)
    x = torch.randn(7, 3, 8, 8).contiguous(memory_format=memory_format)
    batch = x, torch.randint(5, (7,))
    with Backwards() as whole:
        expected = fp.gradient_moments(model, [batch])
    monkeypatch.setattr(conv, "CPU_BYTES", bytes_at_once)
    with Backwards() as parts:
        found = fp.gradient_moments(model, [batch])
    if memory_format is torch.contiguous_format and bytes_at_once == 1:
        assert parts.count > whole.count
    for name in expected.mean:
        torch.testing.assert_close(found.mean[name], expected.mean[name])
        torch.testing.assert_close(found.fisher[name], expected.fisher[name])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_features():
    """As the last clusters of ``AdaptiveLogSoftmaxWithLoss`` may be."""

    def forward(m, x):
        h = m.fc(x).tanh()
        return (h + m.out(m.into(h)) + h @ m.left @ m.right).mean(1)

    parts = {"into": nn.Linear(8, 0), "out": nn.Linear(0, 8)}
    parts |= {"left": drawn(8, 0), "right": drawn(0, 8)}
    model = read(forward, fc=nn.Linear(8, 8), **parts)
    (x, y), named = data(TOKENS), dict(model.named_parameters())
    found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, truth.moments(model, x, y, named))
