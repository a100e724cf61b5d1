"""Models of functions that keep samples apart: nothing runs alone, and all is exact."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from nets import data
from torch import nn

import fisherprune as fp

SAMPLES = 4  # as many as channels: a wrong axis has the right size


class Between(nn.Module):
    """What a function makes of images ``[N, 4, 6, 6]`` between two layers."""

    def __init__(self, run):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.norm, self.line = nn.BatchNorm2d(4), nn.Conv1d(4, 4, 3)
        self.up, self.depth = nn.ConvTranspose2d(4, 4, 2), nn.Conv3d(4, 2, 1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.each = nn.Parameter(torch.rand(SAMPLES, 4, 1, 1) + 0.5)
        self.layer = nn.LayerNorm([4, 6, 6])
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.all = nn.Parameter(torch.randn(SAMPLES, 4, 6, 6, SAMPLES, 3))
        self.head = nn.LazyLinear(5)
        self.run, self.runs = run, 0
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.eval()(torch.zeros(SAMPLES, 3, 6, 6))

    def forward(self, x):
        self.runs += 1
        h = self.run(self, self.first(x))
        return self.head(h.flatten(1))


def deep(h):
    return h.unsqueeze(2)


def line(h):
    return h.flatten(2)


def in_halves(m, h):
    one, other = h.chunk(2, dim=1)
    return torch.cat([other, one.relu()], 1)


def shuffled(m, h):
    n, channels, height, width = h.size()
    h = h.view(n, 2, channels // 2, height, width)
    return torch.transpose(h, 1, 2).contiguous().view(n, -1, height, width)


def gated(m, h):
    gate = F.adaptive_avg_pool2d(h, 1)
    return F.hardsigmoid(gate) * h


def added(m, h):
    other = m.second(F.relu(h))
    other += F.max_pool2d(h, 3, 1)
    return other


ROWWISE = {
    "gated": gated,
    "shuffled": shuffled,
    "in_halves": in_halves,
    "added in place": added,
    "norm": lambda m, h: m.norm(h),
    "norm, relu in place": lambda m, h: F.relu(m.norm(h), inplace=True),
    "scaled": lambda m, h: m.scale * h,
    "scaled in place": lambda m, h: m.norm(h).mul_(m.scale),
    "line": lambda m, h: m.line(line(h)),
    "transposed": lambda m, h: m.up(h),
    "volumes": lambda m, h: m.depth(deep(h)),
    "layer norm": lambda m, h: m.layer(h),
    "group norm": lambda m, h: F.group_norm(h, 2),
    "channels last": lambda m, h: F.layer_norm(h.permute(0, 2, 3, 1), [4]),
    "permuted": lambda m, h: torch.permute(h, (0, 3, 1, 2)).reshape(len(h), 6, -1),
    "transposed axes": lambda m, h: h.transpose(1, -1),
    "split": lambda m, h: torch.add(*torch.split(h, 2, dim=1)),
    "mean": lambda m, h: h.mean([2, 3], keepdim=True) + h.sum(-1, keepdim=True),
    "softmax": lambda m, h: h.softmax(1) + F.softmax(h, dim=-1),
    "sub, div": lambda m, h: torch.sub(h, torch.sigmoid(h)).div(F.softplus(h)),
    "pools": lambda m, h: F.avg_pool2d(F.max_pool2d(h, 2, 1), 2),
    "pooled lines": lambda m, h: F.max_pool1d(F.avg_pool1d(line(h), 2), 2),
    "pooled volumes": lambda m, h: F.adaptive_max_pool3d(deep(h), (1, 2, 2)),
    "interpolated": lambda m, h: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "no dropout": lambda m, h: F.dropout(F.dropout2d(h, training=False), 0.5, False),
    "unflattened": lambda m, h: h.unflatten(1, (2, 2)).squeeze(-1).flatten(2),
    "activations": lambda m, h: F.gelu(F.silu(F.elu(F.leaky_relu(F.hardswish(h))))),
    "inner": lambda m, h: torch.inner(h, m.weight),
    "einsum": lambda m, h: torch.einsum("ncxy,yo->ncxo", h, m.weight),
    "einsum, weight first": lambda m, h: torch.einsum("oy, ncxy -> nocx", m.weight, h),
    "tensordot": lambda m, h: torch.tensordot(h, m.weight, 1),
    "maximum": lambda m, h: torch.maximum(torch.minimum(h, m.scale), m.norm(h)),
    "numbers": lambda m, h: (
        (h * 0.5 - 2).div(3).add_(1) + h[:, :3, 2:5:2].mean((1, 2), True)
    ),
    "a row where sizes are read": lambda m, h: h.view(len(h), -1)[:, 1:],
    "a row": lambda m, h: h[:, 0] + h[..., -1].mean(1, keepdim=True),
    "parts": lambda m, h: h[:, None, 1:, :2, -1] * h[..., 1:, 0, :2].unsqueeze(1),
    "more activations": lambda m, h: F.mish(F.selu(F.relu6(F.hardtanh(h.tanh())))),
}

OTHERWISE = {
    "an unknown function": lambda m, h: h.cos(),
    "a number where sizes are read": lambda m, h: h * (1 / h.size(1)),
    "einsum of a list": lambda m, h: torch.einsum("ncxy->ncyx", [h]),
    "a new tensor": lambda m, h: h + torch.ones(4, 1, 1),
    "caught": lambda m, h: tried(h),
    "random in Python": lambda m, h: F.relu(h) if random.random() < 2 else h,
    "random in NumPy": lambda m, h: F.relu(h) if np.random.rand() < 2 else h,
    "changed by an unseen function": lambda m, h: F.relu(
        unseen(lambda t: t.mul_(2), m.norm(h))
    ),
    "an index where sizes are read": lambda m, h: h[:, : h.shape[1] - 1, 0],
    "a list in an index": lambda m, h: h[:, [0, 2]],
    "samples in a view": lambda m, h: h.transpose(0, 1).transpose(0, 1),
}
"""Exact, too, but a sample has to run alone to see it."""


def tried(h):
    try:
        return h.neg().relu()
    except Exception:
        return h.relu()


def unseen(change, h):
    """Change a tensor as a function of an extension may, without a word."""
    with torch._C.DisableTorchFunction():
        return change(h)


MIXING = {
    "mean": lambda m, h: h - h.mean(0, keepdim=True),
    "mean of all but one axis": lambda m, h: h - h.mean((0, 2, 3), keepdim=True),
    "softmax": lambda m, h: h.softmax(0),
    "softmax by a negative axis": lambda m, h: F.softmax(h, dim=-4),
    "transposed": lambda m, h: h.transpose(0, 1),
    "permuted": lambda m, h: h.permute(1, 0, 2, 3),
    "joined": lambda m, h: torch.cat([h, h]).view(len(h), -1),
    "halves": lambda m, h: torch.cat(h.chunk(2)[::-1]),
    "channels are samples": lambda m, h: F.conv2d(h.mean(1), m.second.weight),
    "layer norm": lambda m, h: F.layer_norm(h, h.shape),
    "einsum": lambda m, h: torch.einsum("ncxy,cd->dnxy", h, m.each[:, :, 0, 0]),
    "einsum of samples": lambda m, h: torch.einsum("ncxy,nd->ndxy", h, m.square),
    "einsum of itself": lambda m, h: torch.einsum("ncxy,mcxy->nm", h, h),
    "tensordot": lambda m, h: torch.tensordot(h, m.square, ([0], [0])),
    "tensordot of all axes": lambda m, h: torch.tensordot(h, m.all, 4),
    "tensordot of all": lambda m, h: h + torch.tensordot(h, m.norm(h).detach(), 4),
    "statistics": lambda m, h: F.batch_norm(h, None, None, training=True),
    "lines of samples": lambda m, h: F.avg_pool1d(h.flatten(1), 3, 1, 1).T.reshape(
        h.shape
    ),
    "in place, unseen": lambda m, h: F.relu(
        unseen(lambda t: t.add_(t.sum(0)), m.norm(h))
    ),
    "caught": lambda m, h: rolled(h),
    "the number of samples": lambda m, h: h / len(h),
    "an index of the number of samples": lambda m, h: h[:, :, : 1 + len(h)].sum(2),
    "in place by the number of samples": lambda m, h: h.mul_(h.numel()),
    "the first sample": lambda m, h: h - h[0],
    "the first sample by an ellipsis": lambda m, h: h - h[..., 0, :, :, :],
    "samples backwards": lambda m, h: h[[3, 2, 1, 0]],
    "an axis in front": lambda m, h: h[None, :, 0].transpose(0, 1).roll(1, 0),
    "dropout": lambda m, h: F.dropout(h),
}


def rolled(h):
    try:
        return h.roll(1, 0).relu()
    except Exception:
        return h.relu()


def drawn(samples=2 * SAMPLES + 1):
    x, y = data((3, 6, 6), samples)
    return x, y, [(x[i : i + SAMPLES], y[i : i + SAMPLES]) for i in (0, 4, 8)]


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("case", ROWWISE)
def test_what_keeps_samples_apart_is_known_without_a_run(case, group_size):
    model, (x, y, batches) = Between(ROWWISE[case]), drawn()
    model.runs, names = 0, [name for name, _ in model.named_parameters()]
    names.remove("each")
    named = {n: p for n, p in model.named_parameters() if n in names}
    found = fp.gradient_moments(model, batches, parameters=named, group_size=group_size)
    assert model.runs == len(batches)
    assert_moments(found, truth.moments(model, x, y, names, group_size))


@pytest.mark.parametrize("case", OTHERWISE)
def test_where_that_is_not_known_a_sample_runs_alone(case):
    model, (x, y, batches) = Between(OTHERWISE[case]), drawn()
    model.runs, names = 0, ["first.weight", "head.bias"]
    named = {n: p for n, p in model.named_parameters() if n in names}
    with warnings.catch_warnings(action="ignore"):
        found = fp.gradient_moments(model, batches, parameters=named)
    assert model.runs >= len(batches) + 1
    assert_moments(found, truth.moments(model, x, y, names))


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_samples_is_refused(case):
    for batches in (drawn()[2], drawn()[2][:1]):
        model = Between(MIXING[case])
        named = {"first.weight": model.first.weight, "head.bias": model.head.bias}
        with pytest.raises(fp.FisherpruneError, match="mix|one sample|alone"):
            fp.gradient_moments(model, batches, parameters=named)


def test_a_parameter_for_each_place_in_a_batch_is_none_of_all_samples():
    model, (_, _, batches) = Between(lambda m, h: h * m.each), drawn()
    with pytest.raises(fp.FisherpruneError):
        fp.gradient_moments(model, batches, parameters={"each": model.each})


def test_the_loss_may_read_what_the_model_does_not_know():
    model, (x, y, batches) = Between(ROWWISE["norm"]), drawn()
    names = ["first.weight", "head.weight"]
    named = {n: p for n, p in model.named_parameters() if n in names}

    def loss(outputs, labels):
        decay = model.first.weight.square().sum()
        return F.cross_entropy(outputs, labels) + decay

    with warnings.catch_warnings(action="ignore"):
        found = fp.gradient_moments(model, batches, loss_fn=loss, parameters=named)
    double = truth.in_double(model)
    weights = [dict(double.named_parameters())[n] for n in names]
    rows = [
        torch.autograd.grad(
            F.cross_entropy(truth.run(double, x[i : i + 1].double()), y[i : i + 1])
            + double.first.weight.square().sum(),
            weights,
            materialize_grads=True,
        )
        for i in range(len(x))
    ]
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        fisher = torch.stack(column).square().mean(0)
        assert truth.relative_error(found.fisher[name], fisher) < 1e-5, name


def test_errors_of_the_model_are_its_own():
    def fails(m, h):
        raise ValueError("no room")

    model = Between(lambda m, h: h)
    model.run = fails
    with pytest.raises(fp.FisherpruneError, match="failed on batch 0 .*no room"):
        fp.gradient_moments(model, drawn()[2])


class OnInputs(nn.Module):
    """What a function makes of inputs, and a layer."""

    def __init__(self, run):
        super().__init__()
        self.head, self.run, self.runs = nn.Linear(6, 5), run, 0

    def forward(self, x):
        self.runs += 1
        return self.head(self.run(x))


class Lookup(nn.Module):
    """The mean of a table's rows, and a layer."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6, **options), nn.Linear(6, 5)
        self.runs = 0

    def forward(self, tokens):
        self.runs += 1
        if tokens.is_floating_point():  # as the loop of truth has all inputs
            tokens = tokens.long()
        return self.head(self.table(tokens).mean(1))


def lookups(**options):
    model, y = Lookup(**options), torch.randint(5, (2 * SAMPLES,))
    tokens = torch.randint(7, (2 * SAMPLES, 3))
    batches = [(t, y[:SAMPLES]) for t in tokens.split(SAMPLES)]
    names = [name for name, _ in model.named_parameters()]
    return model, (tokens, torch.cat([y[:SAMPLES]] * 2), names), batches


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"sparse": True}])
def test_lookups_keep_samples_apart(options):
    model, truth_of, batches = lookups(**options)
    expected = truth.moments(model, *truth_of)
    model.runs = 0
    found = fp.gradient_moments(
        model, batches, parameters=dict(model.named_parameters())
    )
    assert model.runs == len(batches)
    assert_moments(found, expected)


def test_lookups_that_change_their_table_run_for_a_sample_alone():
    model, _, batches = lookups(max_norm=0.5)
    with warnings.catch_warnings(action="ignore"):
        fp.gradient_moments(model, batches, parameters=dict(model.named_parameters()))
    assert model.runs > len(batches)


def moments(model, batches):
    return fp.gradient_moments(
        model, batches, parameters={"head.weight": model.head.weight}
    )


IN_PLACE = {
    "before an unknown function": lambda x: F.relu(x, inplace=True).cos(),
    "of a view": lambda x: F.elu_(x.view(-1, 2, 3)).flatten(1).cos(),
    "alone": lambda x: torch.relu_(x),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_inputs_that_are_changed_in_place_are_read_once(case):
    model, (x, y) = OnInputs(IN_PLACE[case]), data((6,), 2 * SAMPLES)
    copies = [(x[:SAMPLES].clone(), y[:SAMPLES]), (x[SAMPLES:].clone(), y[SAMPLES:])]
    expected = truth.moments(model, x, y, ["head.weight"])
    assert_moments(moments(model, copies), expected)


def test_inputs_that_an_unseen_function_changes_are_refused():
    model, (x, y) = (
        OnInputs(lambda x: unseen(torch.relu_, x).cos()),
        data((6,), SAMPLES),
    )
    with pytest.raises(
        fp.FisherpruneError, match="must not change its inputs in place"
    ):
        moments(model, [(x, y)])


def test_batches_of_inference_mode():
    model, (x, y) = OnInputs(F.relu), data((6,), SAMPLES)
    expected = truth.moments(model, x, y, ["head.weight"])
    with torch.inference_mode():
        batch = x.clone(), y.clone()
    assert_moments(moments(model, [batch]), expected)
