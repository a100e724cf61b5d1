"""fuse_relu: what it finds, what it must leave, and that nothing else changes."""

import copy
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fisherprune import models
from fisherprune.errors import FisherpruneError, FisherpruneWarning
from fisherprune.sparse.fuse import fuse_relu, unfuse
from fisherprune.sparse.normalize import BatchNorm

torchvision_models = pytest.importorskip("torchvision").models


class Counted(TorchDispatchMode):
    """Counts normalizations by whether there are a residual and a ReLU, and ReLUs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "batch_norm" and func.namespace == "fisherprune":
            self.calls.append((args[1] is not None, args[5]))
        elif name in ("relu", "relu_", "native_batch_norm"):
            self.calls.append(name)
        return func(*args, **kwargs or {})


def calls_of(model, x):
    with Counted() as counted, torch.no_grad():
        model(x)
    return counted.calls


def assert_same(model, fused, x, bound=1e-5):
    """Compare outputs, gradients and buffers of training, then evaluation."""
    fused.load_state_dict(model.state_dict())
    grad = None
    for m in (model, fused):
        m.train().zero_grad()
        y = m(x)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
    size = sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= bound * size, name
    for a, b in zip(model.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=bound, atol=bound)
    with torch.no_grad():
        want, got = model.eval()(x), fused.eval()(x)
    assert (got - want).norm() <= 10 * bound * want.norm()


NETWORKS = {
    # function, image size, (residual, ReLU) -> how many
    "resnet18": (models.resnet.resnet18, 8, {(False, True): 9, (True, True): 8}, 3),
    "resnet20": (models.resnet.resnet20, 8, {(False, True): 10, (True, True): 9}, 0),
    "resnet50": (models.resnet.resnet50, 8, {(False, True): 33, (True, True): 16}, 4),
    "vgg11": (models.vgg.vgg11, 32, {(False, True): 8}, 0),
    "vision_resnet18": (
        torchvision_models.resnet18, 64, {(False, True): 9, (True, True): 8}, 3,
    ),
    "vision_vgg11_bn": (torchvision_models.vgg11_bn, 32, {(False, True): 8}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, one_thread):
    """Every ReLU behind a normalization is found; the other ones are ``plain``."""
    make, size, expected, plain = NETWORKS[name]
    model = make()
    if name == "vision_vgg11_bn":
        model.classifier = nn.Linear(512 * 49, 10)  # without dropout
    fused = fuse_relu(copy.deepcopy(model))
    assert type(fused) is type(model)
    names = [[n for n, _ in m.named_modules()] for m in (fused, model)]
    assert names[0] == names[1]
    x = torch.randn(4, 3, size, size)
    calls = calls_of(fused.train(), x)
    for kind, count in expected.items():
        assert calls.count(kind) == count, (kind, calls)
    assert calls.count((False, False)) == plain
    assert len(calls) == sum(expected.values()) + plain  # no ReLU of its own
    # In float64, where nothing is chaotic; the op itself has tests of its own.
    assert_same(model.double(), fused.double(), x.double(), bound=1e-9)


class Net(nn.Module):
    """A convolution and a normalization, then what ``rest`` does with them."""

    def __init__(self, rest, **modules):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.rest = rest
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.rest(self, x, self.norm(self.conv(x)))


FUSED = {
    "function": lambda m, x, y: F.relu(y),
    "torch": lambda m, x, y: torch.relu(y),
    "method": lambda m, x, y: y.relu(),
    "method_in_place": lambda m, x, y: y.relu_(),
    "function_in_place": lambda m, x, y: F.relu(y, inplace=True),
    "module": lambda m, x, y: m.act(y),
    "sum": lambda m, x, y: F.relu(y + x),
    "sum_behind": lambda m, x, y: F.relu(x + y),
    "sum_function": lambda m, x, y: F.relu(torch.add(x, y)),
    "sum_method": lambda m, x, y: y.add(x).relu(),
    "sum_in_place": lambda m, x, y: y.add_(x).relu(),
    "later": lambda m, x, y: F.relu(y + m.conv(x)),
}


def add_into(m, x, y):
    y += x
    return y.relu()


FUSED["sum_assigned"] = add_into


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name):
    model = Net(FUSED[name], act=nn.ReLU(inplace=True))
    fused = fuse_relu(copy.deepcopy(model))
    x = torch.randn(4, 3, 5, 5)
    assert calls_of(fused, x) == [("sum" in name or name == "later", True)]
    assert_same(model, fused, x)


def into_input(m, x, y):
    z = x * 1
    z += y
    return F.relu(z) + z


def changed_between(m, x, y):
    z = x * 1
    s = y + z
    z.mul_(2)
    return F.relu(s) + z


def input_changed_between(m, x, y):
    z = x * 2
    y = m.norm(z)
    z.add_(1)
    return F.relu(y) + z


@pytest.mark.parametrize("change", [operator.iadd, operator.isub, operator.imul])
def test_another_name_of_what_is_changed_in_place(change):
    """Both names have the new value in the graph, as they have in the model."""

    def run(m, x, y):
        z = m.conv(x)
        change(z, x)
        return F.relu(m.norm(z)) * z

    model = Net(run)
    fused = fuse_relu(copy.deepcopy(model))
    assert "forward" in vars(fused)
    assert_same(model, fused, torch.randn(4, 3, 5, 5))


LEFT = {
    "read_twice": lambda m, x, y: F.relu(y) + y,
    "sum_read_twice": lambda m, x, y: (lambda s: F.relu(s) + s)(x + y),
    "other_function": lambda m, x, y: F.relu6(y),
    "number": lambda m, x, y: F.relu(y + 1),
    "scaled_sum": lambda m, x, y: F.relu(torch.add(y, x, alpha=2)),
    "with_itself": lambda m, x, y: F.relu(y + y),
    "three": lambda m, x, y: F.relu(y + x + x),
    "into_input": into_input,
    "changed_between": changed_between,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    model = Net(LEFT[name])
    fused = fuse_relu(copy.deepcopy(model))
    x = torch.randn(4, 3, 5, 5)
    assert not any(c in calls_of(fused, x) for c in [(False, True), (True, True)])
    assert_same(model, fused, x)


def test_an_input_that_is_changed_between():
    model = Net(input_changed_between)
    fused = fuse_relu(copy.deepcopy(model))
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_residual_that_broadcasts():
    def rest(m, x, y):
        return F.relu(y + x.mean((2, 3), keepdim=True))

    model = Net(rest)
    fused = fuse_relu(copy.deepcopy(model))
    assert_same(model, fused, torch.randn(4, 3, 5, 5))


def test_a_module_in_two_places():
    """One normalization with a ReLU behind it here and none there."""
    model = Net(lambda m, x, y: m.norm(F.relu(y)))
    fused = fuse_relu(copy.deepcopy(model))
    x = torch.randn(4, 3, 5, 5)
    assert calls_of(fused, x) == [(False, True), (False, False)]
    assert_same(model, fused, x)


def test_all_stays_where_it_was():
    model = models.resnet.resnet20()
    parameters = dict(model.named_parameters())
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    fused = fuse_relu(model)
    assert fused is model and type(model.layer1) is nn.Sequential
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    seen = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.layer1[0].conv1.register_forward_hook(lambda *_: seen.append("leaf"))
    model.train()
    copied = copy.deepcopy(model)
    before = model.linear.weight.detach().clone()
    with torch.no_grad():
        copied.linear.weight.zero_()
    assert torch.equal(model.linear.weight, before)
    x = torch.randn(4, 3, 8, 8)
    model(x)
    assert seen == ["leaf", "model"]
    assert copied(x).var(0).max() == 0  # a copy runs with modules of its own
    assert unfuse(model) is model and calls_of(model, x).count("relu") == 19
    assert not any(isinstance(m, BatchNorm) for m in model.modules())


@pytest.mark.parametrize("name", ["norm", "act"])
def test_modules_with_hooks_are_left(name):
    """A hook sees what it saw before."""
    model, seen = Net(FUSED["module"], act=nn.ReLU()), []
    getattr(model, name).register_forward_hook(lambda m, i, y: seen.append(y))
    x = torch.randn(4, 3, 5, 5)
    want = model(x)
    got = fuse_relu(model)(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


def sets(m, x, y):
    m.last = F.relu(y)
    return m.last


def test_tracing_leaves_nothing_behind():
    model = fuse_relu(Net(sets))
    assert "last" not in vars(model)
    assert model(torch.randn(4, 3, 5, 5)).min() == 0


def test_twice_is_once():
    model = fuse_relu(fuse_relu(Net(FUSED["sum"])))
    assert calls_of(model, torch.randn(4, 3, 5, 5)) == [(True, True)]


def branches(m, x, y):
    return F.relu(y) if y.sum() > 0 else y


def by_mode(m, x, y):
    return F.relu(y) if m.training else y


def raises(m, x, y):
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (branches, "torch.fx can't trace it: TraceError: "),
        (raises, "torch.fx can't trace it: ZeroDivisionError: no"),
        (by_mode, "it computes something else in training than in evaluation"),
    ],
)
def test_untraceable_models_run_as_before(rest, reason):
    model = Net(rest)
    model.conv.eval()
    with pytest.warns(
        FisherpruneWarning, match=f"fuse_relu: the model runs as .*{reason}"
    ):
        assert fuse_relu(model) is model
    assert type(model.norm) is nn.BatchNorm2d and "forward" not in vars(model)
    assert model.training and not model.conv.training


def test_nothing_to_fuse():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_relu(model) is model
    assert type(model[1]) is nn.BatchNorm2d


def test_no_module():
    with pytest.raises(FisherpruneError, match="fuse_relu: model must be .*, got 3"):
        fuse_relu(3)
