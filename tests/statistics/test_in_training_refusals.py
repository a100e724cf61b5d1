"""Moments beside a training step: what is refused, and what is said of it."""

import math

import pytest
import torch
from nets import Own
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from training_steps import by_class, dense, rows, step

import fisherprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")


def twice(loss):
    """Run a second pass through what the first one has passed."""
    loss.backward(retain_graph=True)
    loss.backward()


PASSES = {
    "second backward pass": twice,
    "without create_graph": lambda loss: loss.backward(create_graph=True),
    "without inputs": lambda loss: loss.backward(inputs=[torch.ones(1)]),
    r"must be loss.backward\(\)": lambda loss: torch.autograd.grad(loss, [loss.input]),
    "got 2": lambda loss: (loss + loss.again()).backward(),
    "comes from other calls, too.*penalty": lambda loss: (
        loss + loss.size()
    ).backward(),
}


@pytest.mark.parametrize("match", PASSES)
def test_backward_passes_that_are_refused(match):
    model, (x, y) = dense(), rows()
    x.requires_grad_()
    with fp.moments(model) as m:
        loss = by_class(model, (x, y)).mean()
        loss.input = x
        loss.again = lambda: by_class(model, (x, y)).mean()
        loss.size = lambda: model[0].weight.square().sum()
        with pytest.raises(fp.FisherpruneError, match=f"^moments: .*{match}"):
            PASSES[match](loss)
    if match != "second backward pass":  # then the first one counts
        assert model[0].weight.grad is None
        with pytest.raises(fp.FisherpruneError, match="model, got none$"):
            m.result()


def test_a_backward_pass_after_the_end():
    model, (x, y) = dense(), rows()
    early = by_class(model, (x, y)).mean()
    with fp.moments(model) as m:
        early.backward()
        late = by_class(model, (x, y)).mean()
    with pytest.raises(fp.FisherpruneError, match="inside of the context; torch"):
        late.backward()
    with pytest.raises(fp.FisherpruneError, match="model, got none"):
        m.result()


def test_what_fails_inside_is_seen_outside():
    model, (x, y) = dense(), rows()
    context = fp.moments(model)
    with pytest.raises(KeyError, match="mine"), context:
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="shapes"), context:
        model(x[:, :3])
    handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), context:
        by_class(model, (x, y)).mean().backward()
    with pytest.raises(fp.FisherpruneError, match="got one that failed"):
        context.result()
    handle.remove()
    model.zero_grad()
    assert step(context, model, (x, y)).samples == 5
    assert "forward" not in vars(model)


def test_infinite_gradients():
    model, batch = dense(), rows()
    with fp.moments(model) as m:
        (by_class(model, batch).mean() * 1e30).backward()
    with pytest.raises(fp.FisherpruneError, match="'0.weight' is NaN or infinite"):
        m.result()


def test_squares_below_the_range_of_float32():
    model, batch = dense(), rows()
    with fp.moments(model) as m:
        (by_class(model, batch).mean() * 1e-25).backward()
    with pytest.warns(fp.FisherpruneWarning, match="scale the loss up, and say so"):
        m.result()


def centered(m, x):
    x = m.first(x)
    return m.last(m.drop(x - x.mean(0) if m.training else x))


def shifted(m, x):
    return m.last(m.drop(m.first(x)).roll(1, 0))


def mixed_up(m, x):
    x, order = m.first(x), torch.rand(len(x)).argsort()
    return m.last((x + x[order]) / 2 if m.training else x)


MIXING = {
    "batch norm": (
        "a BatchNorm layer uses batch statistics",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
    ),
    "batch norm and dropout": (
        "a BatchNorm layer uses batch statistics",
        lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 3)),
    ),
    "centered": ("samples mix", lambda: mixing(centered, 0.0)),
    "centered, dropout": ("row that seems to be of one", lambda: mixing(centered, 0.5)),
    "shifted": ("samples mix", lambda: mixing(shifted, 0.5)),
    "mixed up": ("row that seems to be of one", lambda: mixing(mixed_up, 0.0)),
    "reduced": (
        "must have a tensor of floating-point numbers with the samples first",
        lambda: Own(lambda m, x: m.layer(x).mean(0), layer=nn.Linear(4, 3)),
    ),
}


def mixing(run, dropout):
    layers = {"first": nn.Linear(4, 40), "last": nn.Linear(40, 3)}
    return Own(run, drop=nn.Dropout(dropout), **layers)


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix(name):
    match, make = MIXING[name]
    model = make().train()
    parameters = dict(model.named_parameters())
    with pytest.raises(fp.FisherpruneError, match=match):
        with fp.moments(model, parameters=parameters):
            model(rows(9)[0])
    assert model.training and "forward" not in vars(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    def run(m, x):
        return m.last(checkpoint(m.first, x, use_reentrant=reentrant))

    model = Own(run, first=nn.Linear(4, 6), last=nn.Linear(6, 3))
    batch = rows()[0].requires_grad_(), rows()[1]
    with pytest.raises(
        fp.FisherpruneError, match="^moments: .*activation checkpointing"
    ):
        step(fp.moments(model), model, batch)


def test_tensors_kept_elsewhere():
    model = dense()
    with pytest.raises(fp.FisherpruneError, match="^moments: .*hooks on saved tensors"):
        with save_on_cpu():
            step(fp.moments(model), model, rows())


def test_arguments():
    model = dense()
    for options, match in (
        (
            {"reduction": "none"},
            "moments: reduction must be 'mean' or 'sum', got 'none'",
        ),
        (
            {"scale": 0},
            "moments: scale must be a number above 0, or a function .* got 0",
        ),
        ({"scale": math.inf}, "got inf"),
        ({"same_bits": 1}, "moments: same_bits must be True or False, got 1"),
        ({"parameters": {}}, "at least one parameter"),
    ):
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.moments(model, **options)
    with pytest.raises(fp.FisherpruneError, match="scale must be .* got nan"):
        step(fp.moments(model, scale=lambda: math.nan), model, rows())


def test_models_that_are_refused():
    model = dense()
    with pytest.raises(fp.FisherpruneError, match="watched by one context only"):
        with fp.moments(model), fp.moments(model):
            pass
    context = fp.moments(model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(fp.FisherpruneError, match="got '0.weight', which is frozen"):
        context.__enter__()
    model[0].weight.requires_grad_(True).register_hook(lambda grad: grad)
    with pytest.raises(fp.FisherpruneError, match="must have no gradient hook"):
        context.__enter__()
    several = nn.DataParallel(dense())
    several.device_ids = [0, 1]
    with pytest.raises(fp.FisherpruneError, match="one device, got DataParallel"):
        fp.moments(several).__enter__()
