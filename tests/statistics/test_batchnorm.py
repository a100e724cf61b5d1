"""The statistics that BatchNorm scores with."""

import doctest

import pytest
import torch
from torch import nn

import fisherprune as fp
from fisherprune.statistics import batchnorm


@pytest.mark.parametrize(
    "norm, shape",
    [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (4, 5)), (nn.BatchNorm3d, (2, 3, 4))],
)
def test_means_over_the_batches(norm, shape):
    layer, x = norm(3), torch.randn(12, 3, *shape)
    model = nn.Sequential(layer, nn.Dropout(), nn.Flatten()).eval()
    layer.train()
    state, parts = torch.get_rng_state(), x.split(4)
    fp.measure_batchnorm(model, [(part, torch.zeros(4)) for part in parts])
    dims = (0, *range(2, x.dim()))
    mean = torch.stack([part.double().mean(dims) for part in parts]).mean(0)
    var = torch.stack([part.double().var(dims) for part in parts]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=1e-6)
    assert (layer.training, model[1].training, layer.momentum) == (True, False, 0.1)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_to_measure_on():
    with pytest.raises(fp.FisherpruneError, match="must hold samples, got none"):
        fp.measure_batchnorm(nn.BatchNorm1d(3), [])


def test_one_sample_has_no_variance():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(fp.FisherpruneError, match="at least two samples .*, got 1"):
        fp.measure_batchnorm(layer, [(torch.ones(1, 3), torch.zeros(1))])


def test_example():
    assert doctest.testmod(batchnorm).failed == 0
