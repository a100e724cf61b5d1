"""Squared errors and binary cross-entropies against their formulas."""

from functools import partial

import pytest
import torch
from checks import assert_losses
from torch import nn

import fisherprune as fp
from fisherprune.losses import binary, regression


def network(shape):
    """Return a network whose outputs are ``[N, *shape]``."""
    return nn.Sequential(nn.Linear(3, shape.numel()), nn.Unflatten(1, shape or (1,)))


SHAPES = [torch.Size(s) for s in [(1,), (4,), (2, 3)]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_regression_is_its_formula(shape, reduction):
    batch = torch.randn(6, 3), torch.randn(6, *shape)

    def expected(model, one):
        errors = (model(one[0]) - one[1]) ** 2
        return errors.sum() / (shape.numel() if reduction == "mean" else 1)

    losses = partial(regression, reduction=reduction)
    assert_losses(losses, network(shape), batch, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_binary_is_its_formula(shape, kind, reduction):
    numbers = torch.rand(6, *shape)
    labels = numbers if kind.is_floating_point else (numbers < 0.5).to(kind)

    def expected(model, one):
        p, y = torch.sigmoid(model(one[0])), one[1].double()
        terms = -(y * p.log() + (1 - y) * (1 - p).log())
        return terms.sum() / (shape.numel() if reduction == "mean" else 1)

    losses = partial(binary, reduction=reduction)
    assert_losses(losses, network(shape), (torch.randn(6, 3), labels), expected)


@pytest.mark.parametrize("losses", [binary, regression])
def test_one_number_a_sample(losses):
    flat = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    x, y = torch.randn(6, 3), torch.rand(6)
    found = losses(flat, {"input": x, "labels": y})
    torch.testing.assert_close(found, losses(flat[0], (x, y[:, None])))


@pytest.mark.parametrize("losses", [binary, regression])
def test_labels_are_not_broadcast(losses):
    batch = torch.randn(6, 3), torch.rand(6)
    match = r"of the outputs' shape, got outputs \[6, 1\] and labels float32 \[6\]"
    with pytest.raises(fp.FisherpruneError, match=match):
        losses(nn.Linear(3, 1), batch)


@pytest.mark.parametrize("losses", [binary, regression])
def test_other_reductions_are_refused(losses):
    batch = torch.randn(6, 3), torch.rand(6, 2)
    match = f"{losses.__name__}: reduction must be 'mean' or 'sum', got None"
    with pytest.raises(fp.FisherpruneError, match=match):
        losses(nn.Linear(3, 2), batch, reduction=None)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_labels_outside_of_yes_and_no(bad):
    labels = torch.rand(6, 2)
    labels[3, 1] = bad
    with pytest.raises(fp.FisherpruneError, match=r"labels must lie in \[0, 1\], got "):
        binary(nn.Linear(3, 2), (torch.randn(6, 3), labels))


@pytest.mark.parametrize("losses", [binary, regression])
def test_labels_are_real(losses):
    labels = torch.randn(6, 2, dtype=torch.complex64)
    with pytest.raises(fp.FisherpruneError, match=r"labels complex64 \[6, 2\]"):
        losses(nn.Linear(3, 2), (torch.randn(6, 3), labels))
