"""Hutchinson's estimate of the Hessian's diagonal, against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import batches, conv_net, data
from torch import nn

import fisherprune as fp


def smooth_net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def relu_net():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def named(model):
    return {"parameters": dict(model.named_parameters())}


def seed():
    return int(torch.randint(2**31, ()))


@pytest.mark.parametrize("make", [smooth_net, relu_net])
def test_it_is_unbiased_within_its_own_error(make):
    model, (x, y) = make(), data((5,), classes=3)
    options = named(model)
    expected = truth.hessian_diagonal(model, x, y, options["parameters"])
    found = fp.hutchinson_diagonal(
        model, batches(x, y, 5), probes=100, seed=seed(), **options
    )
    assert found.draws == 100
    squares = []
    for name, true in expected.items():
        error = found.mean[name].double() - true
        deviation = found.standard_error[name].double() + 1e-6
        squares.append((error / deviation).square().flatten())
    assert 0.02 < torch.cat(squares).mean() < 8  # 1 in expectation


def test_it_converges_as_the_root_of_the_probes():
    model, (x, y) = smooth_net(), data((5,), classes=3)
    options = named(model)
    expected = truth.hessian_diagonal(model, x, y, options["parameters"])

    def error(probes):
        found = fp.hutchinson_diagonal(
            model, [(x, y)], probes=probes, seed=seed(), **options
        )
        return torch.cat([(found.mean[n] - d).flatten() for n, d in expected.items()])

    few, many = (
        torch.stack([error(probes) for _ in range(6)]).square().mean().sqrt()
        for probes in (4, 64)
    )
    assert 1.6 < few / many < 10  # 4 in expectation


def test_of_a_relu_network_it_converges_to_the_gauss_newton_diagonal():
    model, (x, y) = relu_net(), data((5,), classes=3)
    exact = fp.gauss_newton_diagonal(model, [(x, y)], **named(model))
    errors = [
        sum(float((found.mean[n] - d).norm()) for n, d in exact.items())
        for probes in (2, 200)
        for found in [
            fp.hutchinson_diagonal(
                model, [(x, y)], probes=probes, seed=seed(), **named(model)
            )
        ]
    ]
    assert errors[1] < errors[0] / 2


TWO = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0], [0.0]])


def two_weights(first, second):
    """Return a network whose loss has the Hessian diag(1, 9): no noise."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[first, second]])
    return model, {"loss_fn": F.mse_loss, "parameters": {"w": model.weight}}


def test_criteria_of_two_weights():
    model, options = two_weights(4.0, -2.0)
    codes = ["hutchinson_diag", "hutchinson_pruner", "hutchinson_taylor"]
    scores = fp.score_all(model, [TWO], codes, seed=seed(), **options)
    # m is 3 and -18: the means of 2 (w x - y) x over two samples.
    wanted = [[1.0, 9.0], [8.0, 18.0], [4 * 3 + 8.0, 2 * 18 + 18.0]]
    for code, values in zip(codes, wanted, strict=True):
        torch.testing.assert_close(scores[code]["w"], torch.tensor([values]))


def test_what_is_negative_goes_first_but_for_the_taylor_form():
    model, options = two_weights(4.0, -2.0)
    options["loss_fn"] = lambda o, y: -F.mse_loss(o, y)
    for code, kept in (
        ("hutchinson_diag", [True, False]),  # -1, -9
        ("hutchinson_pruner", [True, False]),  # -8, -18
        ("hutchinson_taylor", [False, True]),  # 20, 54
    ):
        scores = fp.score(model, [TWO], code, **options)
        assert (code == "hutchinson_taylor") == bool((scores["w"] > 0).all())
        masks = fp.select_masks(scores, 0.5)
        assert masks["w"].tolist() == [kept], code


def test_batches_change_nothing_and_seeds_do():
    model, (x, y) = conv_net(), data((3, 9, 9))
    options = {"probes": 2, "parameters": fp.prunable_parameters(model)}
    one, *others = (
        fp.hutchinson_diagonal(model, batches(x, y, size), seed=3, **options)
        for size in (13, 5, 1)
    )
    settings = fp.Settings(probes=2)
    scores = fp.score(model, [(x, y)], "hutchinson_diag", settings=settings, seed=3)
    another = fp.hutchinson_diagonal(model, [(x, y)], seed=4, **options)
    for name, mean in one.mean.items():
        for other in others:
            assert truth.relative_error(other.mean[name], mean.double()) < 1e-3
        assert truth.relative_error(scores[name], mean.double()) < 1e-4
        assert not torch.allclose(another.mean[name], mean)


def test_everything_is_left_as_found():
    model, (x, y) = conv_net().train(), data((3, 9, 9))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    fp.hutchinson_diagonal(model, [(x, y)], probes=2)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_curvature_that_float32_can_not_hold_is_scored():
    model, (x, y) = smooth_net(), data((5,), classes=3)
    options = named(model)
    wanted = fp.score(model, [(x, y)], "hutchinson_pruner", **options)
    options["loss_fn"] = lambda o, y: F.cross_entropy(o, y) * 2.0**-125
    found = fp.score(model, [(x, y)], "hutchinson_pruner", **options)
    tops = [max(float(s.abs().max()) for s in x.values()) for x in (found, wanted)]
    for name, score in wanted.items():
        torch.testing.assert_close(
            found[name] / tops[0], score / tops[1], rtol=1e-4, atol=1e-6
        )


def test_a_loss_that_is_linear_has_no_curvature():
    model, (x, y) = nn.Linear(5, 3), data((5,), classes=3)
    options = {"loss_fn": lambda o, y: o.sum(), **named(model)}
    found = fp.hutchinson_diagonal(model, [(x, y)], **options)
    assert not any(mean.any() for mean in found.mean.values())


class Attention(nn.Module):
    """Fused attention, which has no second derivative; inputs [N, T, 4]."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.head(h.squeeze(1).mean(1))


def test_of_attention():
    model, (x, y) = Attention(), data((3, 4), classes=3)
    found = fp.hutchinson_diagonal(model, [(x, y)], **named(model))
    assert all(mean.any() for mean in found.mean.values())


def test_mistakes():
    model, (x, y) = smooth_net(), data((5,), classes=3)
    match = "probes must be an integer of at least 2, got 1"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.hutchinson_diagonal(model, [(x, y)], probes=1)
    with pytest.raises(
        fp.FisherpruneError, match="hutchinson_diagonal: batches must h"
    ):
        fp.hutchinson_diagonal(model, [])
    match = "Hutchinson's estimate of the Hessian's diagonal of .* NaN or infinite"
    loss_fn = lambda o, y: o.clamp_min(0).pow(0.5).sum() * 0 + o.abs().sqrt().sum()  # noqa: E731
    zero = nn.Linear(5, 3, bias=False)
    nn.init.zeros_(zero.weight)
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.hutchinson_diagonal(zero, [(x, y)], loss_fn, parameters={"w": zero.weight})
