"""The module BatchNorm: as PyTorch's in training and evaluation, and in its place."""

import copy

import pytest
import torch
from torch import nn

from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.replace import replaced

KINDS = {
    "1d_flat": (nn.BatchNorm1d, ()),
    "1d": (nn.BatchNorm1d, (9,)),
    "2d": (nn.BatchNorm2d, (5, 7)),
    "3d": (nn.BatchNorm3d, (3, 4, 2)),
}

OPTIONS = {
    "default": {},
    "cumulative": dict(momentum=None),
    "momentum": dict(momentum=0.7),
    "not_affine": dict(affine=False),
    "no_statistics": dict(track_running_stats=False),
    "eps": dict(eps=0.3),
}


def pair(kind, **options):
    """Return PyTorch's module and ours, equal."""
    theirs = kind(6, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    return theirs, replaced(copy.deepcopy(theirs))


def innermost(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_equal_pytorchs(kind, options):
    kind, positions = KINDS[kind]
    theirs, ours = pair(kind, **OPTIONS[options])
    assert type(ours) is BatchNorm
    for step in range(4):
        for mode in (True, False):
            theirs.train(mode), ours.train(mode)
            x = torch.randn(8, 6, *positions) * (step + 1) + 3
            inputs = [x.clone().requires_grad_(), innermost(x).requires_grad_()]
            outputs = [m(x) for m, x in zip((theirs, ours), inputs, strict=True)]
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
            grad = torch.randn_like(x)
            for m, y in zip((theirs, ours), outputs, strict=True):
                m.zero_grad()
                y.backward(grad)
            torch.testing.assert_close(
                inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-5
            )
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
            assert_same_state(ours, theirs)


def assert_same_state(ours, theirs, rtol=1e-6):
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(mine[name], value, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("layout", [lambda x: x, innermost])
def test_the_layout_stays(layout, mode):
    x = layout(torch.randn(6, 3, 5, 4))
    assert BatchNorm(3).train(mode)(x, x, relu=True).stride() == x.stride()


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return (self.norm(self.conv(x)) + x).relu()


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(8),
        nn.Flatten(), nn.Linear(8 * 36, 20), nn.BatchNorm1d(20), nn.Linear(20, 4),
    )  # fmt: skip


def test_twenty_steps_of_training_equal_pytorchs():
    theirs = network().double()
    ours = replaced(copy.deepcopy(theirs).float())
    optimizers = [torch.optim.SGD(m.parameters(), 0.02) for m in (theirs, ours)]
    for _ in range(20):
        x, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            y = model(x.to(next(model.parameters()).dtype))
            optimizer.zero_grad()
            nn.functional.cross_entropy(y, labels).backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        got = ours.state_dict()[name]
        torch.testing.assert_close(got.to(value.dtype), value, rtol=1e-3, atol=1e-4)
    x = torch.randn(5, 3, 8, 8)
    got, want = ours.eval()(x).double(), theirs.eval()(x.double())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "shape", [(6, 3, 5, 4), (1, 3, 1, 1)], ids=["same", "broadcast"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residual_and_relu(dtype, shape, relu, mode):
    """A residual of another shape or dtype is added as PyTorch would."""
    norm, x, residual = nn.BatchNorm2d(3), torch.randn(6, 3, 5, 4), torch.randn(shape)
    residual = residual.to(dtype)
    norm.train(mode)
    want = norm(x) + residual
    ours = BatchNorm(3, relu=relu).train(mode)
    got = ours(x, residual)
    want = want.relu() if relu else want
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(x, residual, relu=True), ours(x, residual).relu())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("weights", "entries"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_other_dtypes(weights, entries, mode):
    theirs, ours = (m.to(weights).train(mode) for m in pair(nn.BatchNorm2d))
    x = torch.randn(8, 6, 4, 4).to(entries)
    got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-6)
    for (name, a), b in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_pytorchs(kind):
    kind, positions = KINDS[kind]
    theirs, ours = pair(kind)
    single = torch.randn(1, 6, *(1 for _ in positions))
    for x in (single, torch.randn(6), torch.randn(2, 6, 2, 2, 2, 2), torch.randn(2, 7)):
        with pytest.raises((ValueError, RuntimeError)) as wanted:
            theirs(x)
        with pytest.raises((ValueError, RuntimeError)) as got:
            ours(x)
        if isinstance(wanted.value, ValueError):
            assert (type(got.value), str(got.value)) == (ValueError, str(wanted.value))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when"):
        ours(single)
    assert ours.eval()(single).shape == single.shape


def test_own_modules_take_any_positions():
    for positions in ((), (3,), (3, 2), (2, 3, 2)):
        x = torch.randn(5, 4, *positions)
        y = BatchNorm(4)(x)
        torch.testing.assert_close(y.movedim(1, 0).flatten(1).mean(1), torch.zeros(4))
    with pytest.raises(ValueError, match="expected at least 2D input .got 1D input"):
        BatchNorm(4)(torch.randn(4))


def test_frozen_statistics_stay():
    """Statistics that are not tracked any more normalize evaluation alone."""
    theirs, ours = pair(nn.BatchNorm2d)
    x = torch.randn(8, 6, 4, 4)
    for m in (theirs, ours):
        m(x)
        m.track_running_stats = False
        m(x + 5)
    assert_same_state(ours, theirs)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_repr_tells_of_a_relu():
    assert repr(BatchNorm(3, relu=True)).endswith("relu=True)")
    assert "relu" not in repr(BatchNorm(3))
