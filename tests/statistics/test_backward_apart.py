"""Models whose own code changes gradients: samples must not mix in it either."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from checks import assert_moments, refused
from layer_calls import drawn
from nets import Own, data
from torch import nn

import fisherprune as fp


def of_samples(model, x, y):
    """Return {name: (m, F)} of every parameter: a float64 loop over batches of one."""
    model = copy.deepcopy(model).double()
    weights = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1]),
            [*weights.values()],
        )
        for i in range(len(x))
    ]
    columns = map(torch.stack, zip(*rows, strict=True))
    return {
        name: (each.mean(0), each.square().mean(0))
        for name, each in zip(weights, columns, strict=True)
    }


class Function(torch.autograd.Function):
    """Changes the gradient alone."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def hooked(h, change):
    if h.requires_grad:
        h.register_hook(change)
    return h


def changing(change, way=Function.apply):
    """Return a network of inputs [N, 4] the gradient of whose middle is changed."""
    return Own(
        lambda m, x: m.head(torch.tanh(way(m.fc(x), change))),
        fc=nn.Linear(4, 6),
        head=nn.Linear(6, 5),
    )


def with_mean(m, x):
    """Add a mean over the samples to the gradients, and nothing to the values."""
    h = m.fc(x)
    mean = h.mean(0)
    return m.head(torch.tanh(h + mean - mean.detach()))


def equilibrium(m, x):
    """Solve z = tanh(z w + x), and its backward equation in a hook."""
    step = lambda z: torch.tanh(z @ m.w + m.fc(x))  # noqa: E731
    with torch.no_grad():
        z = torch.zeros(len(x), 6).to(x)
        for _ in range(60):
            z = step(z)
    z = step(z)
    start = z.detach().requires_grad_()
    again = step(start)

    def solve(grad):
        found = grad
        for _ in range(60):
            (own,) = torch.autograd.grad(again, start, found, retain_graph=True)
            found = own + grad
        return found

    return m.head(hooked(z, solve))


def solving():
    model = Own(equilibrium, fc=nn.Linear(4, 6), head=nn.Linear(6, 5), w=drawn(6, 6))
    nn.init.normal_(model.w, std=0.1)
    return model


MIXING = {
    "the norm of a batch's gradient": lambda: changing(lambda g: g / g.norm()),
    "the same in a hook": lambda: changing(lambda g: g / g.norm(), hooked),
    "the mean of what is detached": lambda: Own(
        with_mean, fc=nn.Linear(4, 6), head=nn.Linear(6, 5)
    ),
    "a backward equation": solving,
}


@pytest.mark.parametrize("what", MIXING)
@pytest.mark.parametrize("size", [2, 5])
def test_gradients_that_a_batch_changes_are_those_of_samples_alone(what, size):
    model, (x, y) = MIXING[what](), data((4,), size)
    named = dict(model.named_parameters())
    why = "other gradients in a batch|loss reach rows of other samples"
    with pytest.warns(fp.FisherpruneWarning, match=why):
        found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, of_samples(model, x, y))
    assert found.paths["head.weight"] == ("linear",)
    checked = fp.check(model, (x, y))
    assert re.search(why, str(checked))
    assert checked.ways == found.paths


@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
@pytest.mark.parametrize("way", [Function.apply, hooked])
@pytest.mark.parametrize("change", [torch.neg, lambda g: g.clamp(-0.01, 0.01)])
def test_gradients_that_are_changed_sample_by_sample(way, change):
    model, (x, y) = changing(change, way), data((4,))
    found = fp.gradient_moments(
        model, [(x, y)], parameters=dict(model.named_parameters())
    )
    assert_moments(found, of_samples(model, x, y))


def learned_step(m, x):
    """Quantize with a step whose gradient is less the more numbers there are."""
    h, share = m.fc(x), x.numel() ** -0.5
    step = m.step * share + (m.step - m.step * share).detach()
    h = h / step
    return m.head(torch.tanh((h + (h.round() - h).detach()) * step))


SIZED = {
    "divided": lambda: changing(lambda g: g / len(g)),
    "a step's": lambda: Own(
        learned_step, fc=nn.Linear(4, 6), head=nn.Linear(6, 5), step=drawn()
    ),
}


@pytest.mark.parametrize("what", SIZED)
def test_gradients_that_depend_on_the_batch_size_are_refused(what):
    model, (x, y) = SIZED[what](), data((4,))
    name = "step" if what == "a step's" else "fc.weight"
    options = {"parameters": dict(model.named_parameters())}
    match = f"mix in the backward pass: the gradients of '{name}' depend on how many"
    refused(model, x, y, match, **options)
    assert "mix in the backward pass" in str(fp.check(model, (x, y)))
    del options["parameters"][name]
    if what == "a step's":  # the others are as they were
        found = fp.gradient_moments(model, [(x, y)], **options)
        wanted = of_samples(model, x, y)
        assert_moments(found, {n: wanted[n] for n in options["parameters"]})


def test_buffers_that_a_model_changes():
    """The graph of the batch saves what later runs change in place."""

    def forward(m, x):
        m.count.add_(1)
        return m.head(
            Function.apply(torch.tanh(m.fc(x)), torch.neg) * m.count / m.count
        )

    model = Own(forward, fc=nn.Linear(4, 6), head=nn.Linear(6, 5))
    model.register_buffer("count", torch.zeros(6))
    (x, y), named = data((4,)), dict(model.named_parameters())
    found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, of_samples(model, x, y))
    assert "loop" not in str(found.paths)
