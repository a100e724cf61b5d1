"""The gradient through steps of SGD against explicit steps in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import Own, batches, data, randomized
from torch import nn

import fisherprune as fp
from fisherprune import models
from fisherprune.masks.counts import keep_count
from fisherprune.statistics.passes import checked_task
from fisherprune.statistics.run import statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth_net():
    """Return every kind of layer that steps, without kinks; inputs [N, 2, 5, 5]."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(27, 6),
            nn.Tanh(),
            nn.Linear(6, 5),
        )
    )


def meta_gradient(model, data, loss_fn=None, losses=None, parameters=None, **settings):
    """Return P by parameter name."""
    settings = fp.Settings(**settings)
    options = {"losses": losses, "settings": settings}
    task = checked_task(model, data, parameters, loss_fn, **options)
    return statistics_of(task, ["meta_gradient"]).parts["P"]


def after_training(model, batches, lr, momentum):
    """Return the loss of the last batch after steps of SGD on the others."""
    model = copy.deepcopy(model)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches[:-1]:
        loss = F.cross_entropy(model(x.double()), y)
        grads = torch.autograd.grad(loss, [*model.parameters()])
        for p, v, g in zip(model.parameters(), velocity, grads, strict=True):
            p.data -= lr * v.mul_(momentum).add_(g)
    x, y = batches[-1]
    return F.cross_entropy(model(x.double()), y).item()


@pytest.mark.parametrize("steps, momentum", [(1, 0.0), (3, 0.0), (3, 0.9)])
def test_scores_are_differences_of_losses_after_training(steps, momentum):
    """With masks 1 + h and 1 - h on one initial weight at a time."""
    model, (x, y) = smooth_net(), data((2, 5, 5), 4 * (steps + 1))
    several = batches(x, y, 4)
    settings = fp.Settings(inner_steps=steps, inner_lr=0.3, inner_momentum=momentum)
    scores = fp.score(model, several, "prospr", settings=settings)
    exact = truth.in_double(model)
    for name, score in scores.items():
        weight = dict(exact.named_parameters())[name].data.view(-1)
        for i in torch.randperm(len(weight))[:6].tolist():
            before, losses = weight[i].item(), []
            for mask in (1 + 1e-4, 1 - 1e-4):
                weight[i] = before * mask
                losses.append(after_training(exact, several, 0.3, momentum))
            weight[i] = before
            wanted = abs(losses[0] - losses[1]) / 2e-4
            top = score.max().item()
            assert score.view(-1)[i].item() == pytest.approx(wanted, 1e-3, 1e-5 * top)


@pytest.mark.parametrize("size", [1, 3])
def test_it_equals_explicit_steps_in_float64(size):
    model, (x, y) = smooth_net(), data((2, 5, 5), 9)
    named = {n: p for n, p in model.named_parameters() if "1." not in n}
    several = batches(x, y, size)
    expected = truth.meta_gradient(model, several[:3], named, 0.5, 0.9)
    options = {"inner_lr": 0.5, "inner_momentum": 0.9, "inner_steps": 2}
    found = meta_gradient(model, iter(several), parameters=named, **options)
    assert list(found) == list(named)
    for name, wanted in expected.items():
        assert found[name].dtype == torch.float32
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_two_weights_by_hand():
    """With f = b a x, L = f: a' = a - r b x, b' = b - r a x, L' = a' b' z."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    a, b, r = 0.5, -2.0, 0.25
    with torch.no_grad():
        model[0].weight.fill_(a), model[1].weight.fill_(b)
    x, z = 3.0, 0.7
    several = [(torch.tensor([[v]]), torch.zeros(1)) for v in (x, z)]
    settings = fp.Settings(inner_steps=1, inner_lr=r)
    options = {"settings": settings, "loss_fn": lambda outputs, labels: outputs.sum()}
    (score,) = fp.score(model, several, "prospr", **options).values()
    wanted = a * z * ((b - r * a * x) - r * x * (a - r * b * x))
    assert score.item() == pytest.approx(abs(wanted), rel=1e-5)


NETS = {"resnet20": models.resnet20, "vgg11": models.vgg11}


@pytest.mark.parametrize("net", NETS)
def test_masks_equal_those_of_float64(net):
    model, (x, y) = randomized(NETS[net]()), data((3, 8, 8), 4, 10)
    names, several = fp.prunable_parameters(model), batches(x, y, 2)
    gradients = truth.meta_gradient(model, several, names, 0.01)
    settings = fp.Settings(inner_steps=1, inner_lr=0.01)
    found = fp.score(model, several, "prospr", settings=settings)
    total = sum(p.numel() for p in names.values())
    wanted = truth.keep_largest(
        {n: (p.detach().double() * gradients[n]).abs() for n, p in names.items()},
        keep_count(total, 0.9),
    )
    masks = fp.select_masks(found, 0.9, ties="position")
    same = sum(int((masks[n] == wanted[n]).sum()) for n in names)
    assert same >= 0.999 * total, same / total


def test_batches_are_read_again_where_there_are_fewer_than_steps():
    model, (x, y) = smooth_net(), data((2, 5, 5), 8)
    one, two = batches(x, y, 4)
    found = meta_gradient(model, [one, two], inner_steps=4)
    again = meta_gradient(model, [one, two, one, two, one, "unread"], inner_steps=4)
    assert all(torch.equal(found[name], again[name]) for name in found)
    task = checked_task(model, [one, two], None)
    assert statistics_of(task, ["meta_gradient"]).samples == 16


def test_frozen_parameters_stand_still_unless_scored():
    model, (x, y) = smooth_net(), data((2, 5, 5), 8)
    frozen = [model[0].bias, model[4].weight, model[6].weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    named, several = {"4.weight": model[4].weight}, batches(x, y, 4)
    expected = truth.meta_gradient(model, several, named, 0.5)["4.weight"]
    options = {"inner_steps": 1, "inner_lr": 0.5}
    found = meta_gradient(model, several, parameters=named, **options)["4.weight"]
    assert truth.relative_error(found, expected) < 1e-4
    assert not any(parameter.requires_grad for parameter in frozen)


def test_recurrent_layers_and_losses_of_ones_own():
    model = Own(
        lambda m, x: m.head(m.lstm(x)[0][:, -1]),
        lstm=nn.LSTM(4, 3, batch_first=True),
        head=nn.Linear(3, 5),
    )
    (x, y), named = data((3, 4), 8), dict(model.named_parameters())
    expected = truth.meta_gradient(model, batches(x, y, 4), named, 0.5)
    found = meta_gradient(
        model,
        [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}],
        losses=lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"),
        parameters=named,
        inner_steps=1,
        inner_lr=0.5,
    )
    for name, wanted in expected.items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_everything_is_left_as_found():
    model, (x, y) = smooth_net().train(), data((2, 5, 5), 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    meta_gradient(model, batches(x, y, 4))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_in_inference_mode():
    model, (x, y) = smooth_net(), data((2, 5, 5), 8)
    expected = meta_gradient(model, batches(x, y, 4))
    with torch.inference_mode():
        found = meta_gradient(model, batches(x.clone(), y.clone(), 4))
    assert all(torch.equal(p, expected[n]) for n, p in found.items())


def test_mistakes():
    model, (x, y) = smooth_net(), data((2, 5, 5), 8)
    with pytest.raises(
        fp.FisherpruneError, match="meta_gradient: batches must hold samples, got none"
    ):
        meta_gradient(model, [])
    with pytest.raises(fp.FisherpruneError, match="must be an iterable of .* got int"):
        meta_gradient(model, 3)
    with pytest.raises(fp.FisherpruneError, match="NaN or infinite|must be finite"):
        meta_gradient(model, batches(x, y, 2), inner_lr=1e30)
    for name, wrong, wanted in (
        ("inner_steps", 0, "an integer of at least 1, got 0"),
        ("inner_steps", 1.0, "an integer of at least 1, got 1.0"),
        ("inner_lr", 0, "a number above 0, got 0"),
        ("inner_momentum", 1, "a number above 0 and below 1, got 1"),
        ("inner_momentum", "0.9", "a number above 0 and below 1, got '0.9'"),
    ):
        with pytest.raises(fp.FisherpruneError, match=f"{name} must be {wanted}"):
            fp.Settings(**{name: wrong})
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(fp.FisherpruneError, match="meta_gradient: samples mix"):
        meta_gradient(model, [(x, y)])
