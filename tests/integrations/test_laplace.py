"""Diagonal curvature for laplace-torch against its own backends and float64 loops."""

import copy
import doctest
import sys

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import conv_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisherprune.errors import FisherpruneError

laplace = pytest.importorskip("laplace")
from laplace.curvature import (  # noqa: E402
    AsdlEF,
    BackPackEF,
    CurvlinopsEF,
    EFInterface,
    GGNInterface,
)

from fisherprune.integrations.laplace import FisherEF, FisherGGN  # noqa: E402

THEIRS = EFInterface, BackPackEF, AsdlEF, CurvlinopsEF
"""Where all run: a net of Linear layers without positions."""


class Attending(nn.Module):
    """Attention and LayerNorm, which BackPACK does not take; inputs [N, 5, 6]."""

    def __init__(self, outputs=3):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, outputs)

    def forward(self, x):
        return self.head((self.block(x) * self.scale).mean(1))


def plain(outputs=3):
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, outputs))


def data(likelihood, shape, outputs=3, samples=10):
    x = torch.randn(samples, *shape)
    if likelihood == "regression":
        return x, torch.randn(samples, outputs)
    return x, torch.randint(outputs, (samples,))


def fitted(model, likelihood, x, y, backend, subset="all", **options):
    model = copy.deepcopy(model)
    fit = laplace.Laplace(model, likelihood, subset, "diag", backend=backend, **options)
    fit.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    return fit


def squared_gradients(model, likelihood, x, y):
    """Return laplace-torch's definition by a loop over samples in float64."""
    model, regression = truth.in_double(model), likelihood == "regression"
    weights, factor = [*model.parameters()], 0.5 if regression else 1.0
    total = [torch.zeros_like(w) for w in weights]
    for i in range(len(x)):
        output = truth.run(model, x[i : i + 1].double())
        loss = F.mse_loss if regression else F.cross_entropy
        target = y[i : i + 1].double() if regression else y[i : i + 1]
        grads = torch.autograd.grad(loss(output, target, reduction="sum"), weights)
        total = [t + g * g for t, g in zip(total, grads, strict=True)]
    return factor * torch.cat([t.flatten() for t in total])


def close(found, expected, rtol=1e-4):
    scale = float(expected.abs().max())
    return torch.allclose(
        found.double(), expected.double(), rtol=rtol, atol=1e-6 * scale
    )


NETS = {
    "plain": (plain, (4,)),
    "attention": (Attending, (5, 6)),
    "convolutions": (lambda: conv_net(3), (3, 9, 9)),
}


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("net", NETS)
def test_empirical_fisher(net, likelihood):
    make, shape = NETS[net]
    model, (x, y) = make().eval(), data(likelihood, shape)
    ours = fitted(model, likelihood, x, y, FisherEF)
    assert close(ours.H, squared_gradients(model, likelihood, x, y))
    for backend in THEIRS if net == "plain" else ():
        theirs = fitted(model, likelihood, x, y, backend)
        assert close(ours.H, theirs.H) and torch.allclose(ours.loss, theirs.loss)
        variance = theirs.posterior_variance
        assert torch.allclose(ours.posterior_variance, variance, rtol=1e-4)
        if backend is EFInterface:  # the others keep hooks in the model
            for a, b in zip(ours(x), theirs(x), strict=True):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("net", ["plain", "attention"])
def test_gauss_newton(net, likelihood):
    make, shape = NETS[net]
    model, (x, y) = make().eval(), data(likelihood, shape)
    ours, theirs = (
        fitted(model, likelihood, x, y, backend)
        for backend in (FisherGGN, GGNInterface)
    )
    assert close(ours.H, theirs.H) and torch.allclose(ours.loss, theirs.loss)


@pytest.mark.parametrize(
    "ours, theirs", [(FisherEF, EFInterface), (FisherGGN, GGNInterface)]
)
def test_a_part_of_the_weights(ours, theirs):
    model, (x, y) = plain(), data("classification", (4,))
    chosen = torch.tensor([0, 3, 30, 40])
    a, b = (
        fitted(model, "classification", x, y, backend, "subnetwork",
               subnetwork_indices=chosen)
        for backend in (ours, theirs)
    )  # fmt: skip
    assert close(a.H, b.H) and len(a.H) == 4
    a, b = (
        fitted(model, "classification", x, y, backend, "last_layer")
        for backend in (ours, FisherGGN if ours is FisherEF else theirs)
    )
    assert len(a.H) == len(b.H) == 7 * 3 + 3
    if ours is FisherEF:
        whole = squared_gradients(model, "classification", x, y)
        assert close(a.H, whole[-24:])
    else:
        assert close(a.H, b.H)
    model[0].weight.requires_grad_(False)
    a, b = (fitted(model, "classification", x, y, each) for each in (ours, theirs))
    assert len(a.H) == 7 + 24 and close(a.H, b.H)


def test_an_input_that_is_a_mapping():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()

        def forward(self, batch):
            return self.inner(batch["input_ids"])

    x, y = data("classification", (4,))
    model = Named()
    batches = [{"input_ids": x[i : i + 4], "labels": y[i : i + 4]} for i in (0, 4, 8)]

    class Loader(list):
        dataset = x

    for backend, truth_of in ((FisherEF, "EF"), (FisherGGN, "GGN")):
        fit = laplace.Laplace(model, "classification", "all", "diag", backend=backend)
        fit.fit(Loader(batches))
        expected = fitted(model.inner, "classification", x, y, backend)
        assert close(fit.H, expected.H), truth_of


def test_positions_add_up_before_the_square():
    model = nn.Linear(6, 3)
    x, y = torch.randn(4, 5, 6), torch.randint(3, (4, 5))
    _, found = FisherEF(model, "classification").diag(x, y)
    expected = 0
    for i in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[i]), y[i], reduction="sum").backward()
        grads = [model.weight.grad.flatten(), model.bias.grad]
        expected = expected + torch.cat(grads).square()
    assert close(found, expected)


def test_other_structures_are_refused():
    model, (x, y) = plain(), data("classification", (4,))
    for backend in (FisherEF, FisherGGN):
        fit = laplace.Laplace(model, "classification", "all", "kron", backend=backend)
        message = f"{backend.__name__}: hessian_structure must be 'diag' .*, got 'kron'"
        with pytest.raises(FisherpruneError, match=message):
            fit.fit(DataLoader(TensorDataset(x, y), batch_size=4))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    monkeypatch.delitem(sys.modules, "fisherprune.integrations.laplace")
    with pytest.raises(FisherpruneError, match=r"pip install 'fisherprune\[laplace\]'"):
        import fisherprune.integrations.laplace  # noqa: F401


def test_the_example():
    assert doctest.testmod(sys.modules["fisherprune.integrations.laplace"]).failed == 0
