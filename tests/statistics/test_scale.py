"""Gradients whose squares float32 can't hold: against the formulas in float64."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import Mixing, batches, conv_net, data
from torch import nn

import fisherprune as fp
from fisherprune.masks.counts import keep_count
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.hessian_gradient import hessian_gradient_product
from fisherprune.statistics.passes import checked_task
from fisherprune.statistics.run import statistics_of

SCALES = 1e-10, 1e-19, 1e-21, 1e-25, 1e-36, 1e20


def smooth_net():
    """Return a network without kinks, which rounding may turn around."""
    model = conv_net()
    for i, layer in enumerate(model):
        if isinstance(layer, nn.ReLU):
            model[i] = nn.SiLU(inplace=True)
    return model


def times(scale):
    return lambda outputs, labels: F.cross_entropy(outputs, labels) * scale


def expected_scores(model, x, y, code, scale, group_size=1):
    """Apply the formulas to float64 moments."""
    named = fp.prunable_parameters(model)
    found = truth.moments(model, x, y, named, group_size, times(scale))
    return {
        name: truth.score(
            code, p.detach().double(), group_size, m=found[name][0], F=found[name][1]
        )
        for name, p in named.items()
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("code", ["fbss", "fts", "fisher_diag", "fisher_pruner"])
@pytest.mark.parametrize("group_size", [1, 3])
def test_masks_are_those_of_float64(code, scale, group_size):
    model, (x, y) = smooth_net(), data((3, 9, 9))
    expected = expected_scores(model, x, y, code, scale, group_size)
    options = {"loss_fn": times(scale), "group_size": group_size}
    found = fp.score(model, batches(x, y, 5), code, **options)
    total = sum(s.numel() for s in found.values())
    for sparsity in (0.5, 0.9):
        masks = fp.select_masks(found, sparsity, ties="position")
        every = torch.cat([e.flatten() for e in expected.values()])
        least = every.sort(descending=True).values[keep_count(total, sparsity) - 1]
        # One group alone has a gradient in many weights, whose fbss is m^2 / 2 g F = c.
        right = sum(
            int((expected[n][m] >= least * (1 - 1e-5)).sum()) for n, m in masks.items()
        )
        assert right >= 0.999 * masks.kept() - 1
    for name, score in found.items():
        assert score.dtype == torch.float32
        angle = F.cosine_similarity(
            score.double().flatten(), expected[name].flatten() / scale, dim=0, eps=0
        )
        assert angle > 1 - 1e-6, name


@pytest.mark.parametrize("scale", SCALES)
def test_sums_are_exact(scale):
    model, (x, y) = smooth_net(), data((3, 9, 9))
    plain = fp.gradient_moments(model, batches(x, y, 5))
    assert plain.exponent == 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fp.FisherpruneWarning)
            found = fp.gradient_moments(model, batches(x, y, 5), times(scale))
    except fp.FisherpruneError:
        assert scale == 1e20
        return
    # Squares of 1e20 times small gradients may be in range.
    assert found.exponent > 0 if scale < 1 else found.exponent <= 0
    by = 2.0**found.exponent * scale
    for name, sum in plain.sum.items():
        assert truth.relative_error(found.sum[name], sum.double() * by) < 1e-5
        squares = plain.sum_sq[name].double() * by**2
        assert truth.relative_error(found.sum_sq[name], squares) < 1e-5
        mean = plain.mean[name].double()
        assert truth.relative_error(found.mean[name].double() / scale, mean) < 1e-3
        fisher = plain.fisher[name].double() * scale**2
        least = 1e-6 * float(fisher.max()) + 2.0**-149
        assert torch.allclose(found.fisher[name].double(), fisher, 1e-4, least)


@pytest.mark.parametrize("power", [-60, -100, -130])
def test_a_power_of_two_changes_no_bit(power):
    model, (x, y) = smooth_net(), data((3, 9, 9))
    plain = fp.gradient_moments(model, batches(x, y, 5))
    with pytest.warns(fp.FisherpruneWarning):
        found = fp.gradient_moments(model, [(x, y)], times(2.0**power))
    again = fp.gradient_moments(model, [(x, y)])
    for name, sum in again.sum.items():
        scaled = sum.double() * 2.0 ** (power + found.exponent)
        assert torch.equal(found.sum[name].double(), scaled)
    assert plain.exponent == again.exponent == 0


def deep_product(layers=12, width=6):
    """Return a network that multiplies its signal by 1e-3 in each layer."""
    parts = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    for part in parts:
        nn.init.normal_(part.weight, std=1e-3)
    return nn.Sequential(*parts, nn.Linear(width, 5))


@pytest.mark.parametrize(
    "code", ["fbss", "fts", "snip", "grasp", "obd", "hutchinson_pruner"]
)
def test_a_deep_product(code):
    model, (x, y) = deep_product(), data((6,))
    named = fp.prunable_parameters(model)
    moments = truth.moments(model, x, y, named)
    products = truth.hessian_gradient(model, x, y, named)
    curvature = truth.gauss_newton_diagonal(model, x, named)
    estimates = truth.hutchinson(model, x, y, named, 0, 10)
    found = fp.score(model, batches(x, y, 5), code)
    expected = {
        name: truth.score(
            code,
            p.detach().double(),
            m=moments[name][0],
            F=moments[name][1],
            Hm=products[name],
            H=curvature[name],
            D=estimates[name],
        )
        for name, p in named.items()
    }
    top = {
        n: max(float(s.abs().max()) for s in x.values())
        for n, x in (("found", found), ("wanted", expected))
    }
    assert (top["wanted"] < 1e-30) == (code != "fbss") and top["found"] > 0
    for name, score in found.items():
        a, b = score.double() / top["found"], expected[name] / top["wanted"]
        assert (a - b).norm() < 1e-4 * b.norm() + 1e-12, name
    masks = fp.select_masks(found, 0.5, ties="position")
    wanted = truth.keep_largest(expected, masks.kept())
    assert sum(int((masks[n] & wanted[n]).sum()) for n in named) >= masks.kept() - 2


def test_what_is_not_float32_is_told():
    model, (x, y) = Mixing(lambda _, h: torch.tanh(h)), data((4,))
    match = "squared gradients of 'fc.weight' are so small .* zero: prune and score"
    with pytest.warns(fp.FisherpruneWarning, match=match):
        found = fp.gradient_moments(model, [(x, y)], times(1e-25))
    assert not found.fisher["fc.weight"].any() and found.mean["fc.weight"].any()
    assert found.sum_sq["fc.weight"].max() > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.score(model, [(x, y)], "fbss", loss_fn=times(1e-25))
    match = "the mean squared gradient of 'fc.weight' is NaN or infinite"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gradient_moments(model, [(x, y)], times(1e22))
    assert fp.score(model, [(x, y)], "fts", loss_fn=times(1e22))
    linear = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    linear[0].weight.data.fill_(1e-25)
    with pytest.raises(fp.FisherpruneError, match="the Gauss-Newton diagonal of"):
        fp.gauss_newton_diagonal(linear, [(x * 1e25, y)])


def test_what_can_be_read_only_once():
    model, (x, y) = Mixing(lambda _, h: torch.tanh(h)), data((4,))
    match = "gradient_moments: .*'fc.weight'.* give batches that can be read again"
    with pytest.warns(fp.FisherpruneWarning, match=match) as told:
        found = fp.gradient_moments(model, iter([(x, y)]), times(1e-25))
    assert len(told) == 1 and found.exponent == 0
    with pytest.raises(fp.FisherpruneError, match="NaN or infinite"):
        fp.gradient_moments(model, iter([(x, y)]), times(1e22))


def test_gradients_of_too_wide_a_range():
    model, (x, y) = Mixing(lambda _, h: torch.tanh(h)), data((4,))
    named = dict(model.named_parameters())

    def losses(model, batch):
        outputs = model(batch[0])
        return outputs.detach().sum(1) + 1e-30 * outputs.sum(1) + model.head.bias[0]

    match = "squared gradients of 'fc.weight', 'fc.bias', 'head.weight' .* others are"
    with pytest.warns(fp.FisherpruneWarning, match=match):
        fp.gradient_moments(model, [(x, y)], losses=losses, parameters=named)
    alone = {"fc.weight": model.fc.weight}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.score(model, [(x, y)], "fts", losses=losses, parameters=alone)


def test_gradients_of_float16_that_can_not_be_scaled():
    model, (x, y) = Mixing(lambda _, h: torch.tanh(h)), data((4,))
    one = {"fc.bias": model.fc.bias}

    def losses(model, batch):  # float16, whose gradients may not exceed 65504
        known = model(batch[0]).detach().logsumexp(1).half()
        return known + 1e-24 * model.fc.bias.sum()

    read = Counted((x, y))
    with pytest.warns(fp.FisherpruneWarning, match="float16 overflows: pass over"):
        found = fp.gradient_moments(model, read, losses=losses, parameters=one)
    assert (found.exponent, read.times) == (0, 2)


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, *batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


@pytest.mark.parametrize("scale, times_read", [(1.0, 1), (1e-6, 1), (1e-19, 2)])
def test_how_often_batches_are_read(scale, times_read):
    model, (x, y) = smooth_net(), data((3, 9, 9))
    read = Counted((x, y))
    fp.score(model, read, "fts", loss_fn=times(scale))
    assert read.times == times_read


@pytest.mark.parametrize("scales", [(1e-25, 1e-21), (1e-25, 1.0), (1.0, 1e-23)])
def test_sums_of_different_exponents(scales):
    model, (x, y) = smooth_net(), data((3, 9, 9))
    parts = (x[:6], y[:6]), (x[6:], y[6:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FisherpruneWarning)
        one, two = (
            fp.gradient_moments(model, [part], times(scale))
            for part, scale in zip(parts, scales, strict=True)
        )
    both = one + two
    for name in both.sum:
        for letter, power in (("sum", 1), ("sum_sq", 2)):
            a, b, found = (
                getattr(m, letter)[name].double() * 2.0 ** (-power * m.exponent)
                for m in (one, two, both)
            )
            assert (found - (a + b)).norm() <= 1e-6 * (a + b).norm(), name


def test_caches_keep_exponents(tmp_path):
    model, (x, y) = smooth_net(), data((3, 9, 9))
    task = checked_task(model, [(x, y)], None, times(1e-21))
    needs = ["moments", "hessian"]
    cache = StatisticsCache(tmp_path)
    first = statistics_of(task, needs, cache=cache, key="k")
    second = statistics_of(task, needs, cache=cache, key="k")
    assert second.cached and set(first.exponents) == {"m", "F", "Hm"}
    assert replace(second, cached=False, parts={}) == replace(first, parts={})
    for letter, named in first.parts.items():
        assert all(torch.equal(t, second.parts[letter][n]) for n, t in named.items())


def test_the_hessian_product_of_small_gradients():
    model, (x, y) = smooth_net(), data((3, 9, 9))
    named, scale = fp.prunable_parameters(model), 1e-17
    expected = truth.hessian_gradient(model, x, y, named)
    found = hessian_gradient_product(model, [(x, y)], times(scale))
    for name, product in found.items():
        wanted = expected[name] * scale**2
        assert truth.relative_error(product.double() * 1e30, wanted * 1e30) < 1e-4
