"""Models that take gradients of their own weights: no tap sees what these lead to."""

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from nets import batches, data
from torch import nn

import fisherprune as fp


class Adapting(nn.Module):
    """Takes a step on its weight for each task, ``[N, shots, 4]``, or for all of them.

    Args:
        names: of the weights that are adapted.
    """

    def __init__(self, *names, mixes=False):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 5)
        self.names, self.mixes = names, mixes

    def adapted(self, shots):
        own = dict(self.fc.named_parameters())
        loss = torch.tanh(self.fc(shots)).square().mean()
        steps = torch.autograd.grad(
            loss, [own[n] for n in self.names], None, True, True
        )
        own |= {n: own[n] - s for n, s in zip(self.names, steps, strict=True)}
        return self.head(torch.tanh(F.linear(shots, own["weight"], own["bias"])))

    def forward(self, x):
        found = self.adapted(x) if self.mixes else torch.stack([*map(self.adapted, x)])
        return found.mean(1)


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("watched", [("fc.weight", "head.bias"), None])
def test_gradients_of_its_weights_that_the_model_takes(names, watched):
    model, (x, y) = Adapting(*names), data((3, 4))
    named = dict(model.named_parameters())
    parameters = {name: named[name] for name in watched or named}
    with pytest.warns(fp.FisherpruneWarning, match="takes gradients of it by itself"):
        found = fp.gradient_moments(model, batches(x, y, 5), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))
    assert fp.check(model, (x, y), parameters=parameters).ways == found.paths
    with pytest.raises(fp.FisherpruneError, match="takes gradients of it by itself"):
        with fp.moments(model, parameters=parameters):
            F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("first", [1, 5])
def test_a_step_for_all_samples_mixes_them(first):
    model, (x, y) = Adapting("weight", mixes=True), data((3, 4))
    some = [(x[:first], y[:first]), (x[first:], y[first:])]
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        fp.gradient_moments(model, some)
