"""Samples that mix so little that a sample alone has nearly the same values."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from nets import Own
from torch import nn

import fisherprune as fp

TOKENS, EXPERTS = 11, 3


class Experts(nn.Module):
    """Every token goes to all experts, by the weights of a router."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 6)
        self.router = nn.Linear(6, EXPERTS)
        nn.init.normal_(self.router.weight, std=2)  # far from a balanced load
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(EXPERTS))
        self.head = nn.Linear(6, TOKENS)

    def forward(self, tokens):
        h = self.embedding(tokens)
        shares = self.router(h).softmax(-1)
        parts = [expert(h).tanh() for expert in self.experts]
        return self.head(h + (torch.stack(parts, -1) * shares.unsqueeze(-2)).sum(-1))


def balanced(factor, dims):
    """Return losses with one that balances the load, over some dimensions."""

    def losses(model, tokens):
        each = F.cross_entropy(model(tokens).mT, tokens.roll(1, 1), reduction="none")
        shares = model.router(model.embedding(tokens)).softmax(-1)
        return each.mean(1) + factor * shares.mean(dims).square().sum(-1)

    return losses


def drawn(first=6):
    return [torch.randint(TOKENS, (n, 5)) for n in (first, 4)]


@pytest.mark.parametrize("size", [2, 6, 15])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_a_small_loss_of_the_whole_batch_is_refused(factor, size):
    model, losses = Experts(), balanced(factor, (0, 1))
    every = dict(model.named_parameters())
    with pytest.raises(fp.FisherpruneError, match="gradient_moments: samples mix"):
        fp.gradient_moments(model, drawn(size), losses=losses, parameters=every)
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        fp.score(model, drawn(size), "fts", losses=losses, parameters=every)
    assert "samples mix" in str(fp.check(model, drawn(size)[0], losses=losses))


@pytest.mark.parametrize("factor", [1e-2, 1e-3, 1e-4])
def test_one_that_rounding_may_hide_is_that_of_samples_alone(factor):
    model, losses, batches = Experts(), balanced(factor, (0, 1)), drawn()
    every = dict(model.named_parameters())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = fp.gradient_moments(model, batches, losses=losses, parameters=every)
        except fp.FisherpruneError as error:
            assert "samples mix" in str(error)
            return
    assert "reach rows of other samples" in str(told[0].message)
    alone = [each[i : i + 1] for each in batches for i in range(len(each))]
    expected = truth.moments_of_losses(model, alone, [*every], losses, [1])[1]
    assert_moments(found, expected)


@pytest.mark.filterwarnings("error::fisherprune.FisherpruneWarning")
def test_the_same_loss_of_each_sample_is_not():
    model, losses, batches = Experts(), balanced(1.0, 1), drawn()
    every = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches, losses=losses, parameters=every)
    expected = truth.moments_of_losses(model, batches, [*every], losses, [1])[1]
    assert_moments(found, expected)


def mixed(model, x):
    h = model.first(x)
    return model.head(torch.tanh(h + 5e-4 * h.mean(0)))


def reading_the_next(model, x):
    h = model.first(x)
    following = torch.cat([h[1:], h[-1:]])
    return model.head(torch.tanh(h + 2e-4 * following))


def reading_the_one_before(model, x):
    h = model.first(x)
    before = torch.cat([h[:1], h[:-1]])
    return model.head(torch.tanh(h + 2e-4 * before))


def mixed_and_unmixed(model, x):
    h = model.first(x)
    return model.head(torch.tanh(h + h.mean(0) - h.mean(0)))


def given(run, size=5):
    model = Own(run, first=nn.Linear(4, 6), head=nn.Linear(6, 3))
    batches = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (size, 2)]
    return model, batches, dict(model.named_parameters())


@pytest.mark.parametrize("size", [2, 3, 5, 12])
@pytest.mark.parametrize("run", [mixed, reading_the_next, reading_the_one_before])
def test_a_model_that_mixes_a_little_is_refused(run, size):
    model, batches, every = given(run, size)
    with pytest.raises(fp.FisherpruneError, match="gradient_moments: samples mix"):
        fp.gradient_moments(model, batches, parameters=every)


@pytest.mark.filterwarnings("error::fisherprune.FisherpruneWarning")
def test_what_cancels_does_not_mix():
    model, batches, every = given(mixed_and_unmixed)
    found = fp.gradient_moments(model, batches, parameters=every)
    expected = truth.moments_of_losses(
        model, batches, [*every], fp.losses.classification, [1]
    )[1]
    assert_moments(found, expected)


@pytest.mark.parametrize("run", [mixed, mixed_and_unmixed])
def test_buffers_that_a_run_changes(run):
    """What the batch's graph saved is what it was."""

    def forward(model, x):
        model.scale.add_(1).sub_(1)
        return run(model, x * model.scale)

    model, batches, every = given(forward)
    model.register_buffer("scale", torch.ones(4))
    if run is mixed:
        with pytest.raises(fp.FisherpruneError, match="samples mix"):
            fp.gradient_moments(model, batches, parameters=every)
    else:
        found = fp.gradient_moments(model, batches, parameters=every)
        expected = truth.moments_of_losses(
            model, batches, [*every], fp.losses.classification, [1]
        )[1]
        assert_moments(found, expected)
