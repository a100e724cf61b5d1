"""Max-pooling in a pass: by kernels where they are faster, and equal to PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherprune as fp
from fisherprune.persample.backward import UnwatchedLayer
from fisherprune.persample.call_tap import CallTap


def run(pool, x):
    """Return what a function gives in a pass, and whether a kernel of ours ran."""
    head = nn.Parameter(torch.ones(()))
    with CallTap({"head": head}, [x], len(x), "test"):
        y = pool(x)
    node = y.grad_fn
    return y, node is not None and node.name().startswith(UnwatchedLayer.__name__)


def assert_same_bits(x, y):
    assert x.stride() == y.stride() and x.dtype == y.dtype
    assert torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5))
    assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.signbit(), y.signbit())


def draw(kind, shape):
    x = torch.randn(shape)
    if kind == "ties":
        return x.relu_().mul_(2).round_() * torch.randn(shape).sign()  # -0 too
    if kind == "odd":
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
        return torch.where(torch.rand(shape) < 0.4, odd[torch.randint(5, shape)], x)
    return x


WINDOWS = {
    # height and width, kernel, stride, padding, ceil_mode
    "2x2": ((16, 16), 2, 2, 0, False),
    "2x2_odd": ((15, 17), 2, None, 0, True),
    "3x3_apart": ((31, 31), 3, 2, 0, True),
    "3x3_padded": ((32, 32), 3, 2, 1, False),
    "3x3_everywhere": ((8, 8), 3, 1, 1, True),
    "small": ((4, 4), (3,), [1], [1], False),
    "smallest": ((2, 3), 2, 1, 1, False),
    "2x2_everywhere": ((9, 7), 2, 1, 0, False),
    "long": ((6, 40), (2, 5), (3, 2), (1, 2), True),
    "gaps": ((11, 13), 2, 5, 0, False),
}


@pytest.mark.parametrize("kind", ["normal", "ties", "odd"])
@pytest.mark.parametrize("name", WINDOWS)
def test_same_bits_as_pytorch(name, kind):
    size, kernel, stride, padding, ceil_mode = WINDOWS[name]
    for n in (1, 5, 32):
        channels = 2**14 // (n * size[0] * size[1]) + 2
        x = draw(kind, (n, channels, *size)).requires_grad_()
        pool = lambda x: F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)  # noqa: B023, E731
        (y, is_ours), want = run(pool, x), pool(x)
        assert is_ours
        assert_same_bits(y, want)
        grad = torch.randn(y.shape)
        found, truth = (torch.autograd.grad(each, x, grad)[0] for each in (y, want))
        assert_same_bits(found, truth)


X = torch.randn(4, 16, 20, 20)

ORDINARY = {
    "indices": (X, lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "dilation": (X, lambda x: F.max_pool2d(x, 2, 2, 0, 2)),
    "float64": (X.double(), lambda x: F.max_pool2d(x, 2)),
    "bfloat16": (X.bfloat16(), lambda x: F.max_pool2d(x, 2)),
    "channels_last": (
        X.contiguous(memory_format=torch.channels_last),
        lambda x: F.max_pool2d(x, 2),
    ),
    "transposed": (X.mT, lambda x: F.max_pool2d(x, 2)),
    "one image": (X[0], lambda x: F.max_pool2d(x, 2)),
    "few": (X[:, :1], lambda x: F.max_pool2d(x, 2)),
    "many places": (X, lambda x: F.max_pool2d(x, 16)),
    "beyond": (X, lambda x: F.max_pool2d(x[..., :2, :].repeat(1, 9, 1, 1), 3, 2, 1)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_all_others_are_pytorch_s(name):
    x, pool = ORDINARY[name]
    x = x.detach().requires_grad_()
    (y, is_ours), want = run(pool, x), pool(x)
    assert not is_ours
    assert_same_bits(y, want)
    grad = torch.randn_like(y)
    assert_same_bits(*(torch.autograd.grad(each, x, grad)[0] for each in (y, want)))


@pytest.mark.parametrize("options", [(2, 0), (2, 2, 2), ((2, 2, 2),), (30,), (0,)])
def test_errors_are_pytorch_s(options):
    with pytest.raises(Exception) as own:
        run(lambda x: F.max_pool2d(x, *options), X)
    with pytest.raises(Exception) as other:
        F.max_pool2d(X, *options)
    assert (own.type, str(own.value)) == (other.type, str(other.value))


def test_the_result_may_be_changed_in_place():
    x = X.clone().requires_grad_()
    y, is_ours = run(lambda x: F.max_pool2d(x, 2).relu_(), x)
    want = F.max_pool2d(x, 2).relu()
    (found,), (truth,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, want))
    assert torch.equal(found, truth)


def test_second_derivatives():
    x = torch.randn(4, 16, 20, 20, requires_grad=True)

    def second(y):
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    y, is_ours = run(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    assert is_ours
    torch.testing.assert_close(second(y), second(F.max_pool2d(x, 3, 2, 1)))


def test_transforms_inside_of_the_model():
    def pool(x):
        y = torch.func.vmap(lambda each: F.max_pool2d(each, 2))(x[:, None])[:, 0]
        own = lambda x: F.max_pool2d(x, 2).square().sum()  # noqa: E731
        return y + torch.func.grad(own)(x).sum()

    (y, _), want = run(pool, X), pool(X)
    assert torch.equal(y, want)


def test_forward_gradients_inside_of_the_model():
    def pool(x):
        with torch.autograd.forward_ad.dual_level():
            y = F.max_pool2d(torch.autograd.forward_ad.make_dual(x, x * 2), 2)
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    assert torch.equal(run(pool, X)[0], 2 * F.max_pool2d(X, 2))


class Network(nn.Module):
    """A small one with pools of two kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = F.max_pool2d(self.first(x).relu(), 2)
        x = self.pool(self.second(x).relu())
        return self.head(x.amax((2, 3)))


def test_moments_equal_a_loop_over_samples():
    model = Network()
    x, y = torch.randn(8, 3, 40, 40), torch.randint(5, (8,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = fp.gradient_moments(
        model, batches, F.cross_entropy, parameters=dict(model.named_parameters())
    )
    exact, truth = model.double(), {}
    for i in range(8):
        exact.zero_grad()
        F.cross_entropy(exact(x[i : i + 1].double()), y[i : i + 1]).backward()
        for name, p in exact.named_parameters():
            truth[name] = truth.get(name, 0) + p.grad.square() / 8
    for name, want in truth.items():
        assert (found.fisher[name].double() - want).norm() <= 1e-3 * want.norm()
