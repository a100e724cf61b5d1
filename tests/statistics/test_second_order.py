"""The passes of second order against float64 autograd, entry by entry."""

import pytest
import torch
import truth
from nets import Own, SequenceNet, TwiceNet, batches, conv_net, data, randomized
from torch import nn
from torch.autograd.function import once_differentiable

import fisherprune as fp
from fisherprune.statistics.categorical import softmax_hessian_root
from fisherprune.statistics.hessian_gradient import hessian_gradient_product

NETS = {
    "conv": (conv_net, (3, 9, 9)),
    "sequence": (SequenceNet, (4, 12)),
    "twice": (TwiceNet, (4, 8, 8)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("size", [1, 5, 13])
def test_gauss_newton_diagonal_equals_that_of_the_matrix(net, size):
    make, shape = NETS[net]
    model, (x, y) = make(), data(shape)
    parameters = dict(model.named_parameters())  # weights, biases, BatchNorm: all
    expected = truth.gauss_newton_diagonal(model, x, parameters)
    found = fp.gauss_newton_diagonal(model, batches(x, y, size), parameters=parameters)
    assert list(found) == list(parameters)
    for name, diagonal in expected.items():
        assert found[name].dtype == torch.float32
        assert truth.relative_error(found[name], diagonal) < 1e-4, name


def test_many_equal_samples_do_not_lose_digits():
    model, x, y = nn.Linear(1, 3, bias=False), torch.tensor([[0.7]]), torch.zeros(1)
    parameters, y = dict(model.named_parameters()), y.long()
    batch = x.expand(5000, 1), y.expand(5000)
    expected = truth.gauss_newton_diagonal(model, x, parameters)["weight"]
    found = fp.gauss_newton_diagonal(model, [batch] * 40, parameters=parameters)
    assert truth.relative_error(found["weight"], expected) < 1e-5
    few = [(x.expand(3, 1), y.expand(3))] * 1500
    product = truth.hessian_gradient(model, x, y, parameters)["weight"]
    found = hessian_gradient_product(model, few, parameters=parameters)
    assert truth.relative_error(found["weight"], product) < 1e-5


def relu_net(classes):
    """Return piecewise linear layers of every kind; inputs [N, 2, 6, 6]."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(4, 6),
            nn.Hardtanh(),
            nn.Linear(6, classes),
        )
    )


@pytest.mark.parametrize("classes", [2, 5])
def test_of_a_piecewise_linear_network_it_is_the_hessians_diagonal(classes):
    model, (x, y) = relu_net(classes), data((2, 6, 6), classes=classes)
    parameters = dict(model.named_parameters())
    expected = truth.hessian_diagonal(model, x, y, parameters)
    found = fp.gauss_newton_diagonal(model, batches(x, y, 4), parameters=parameters)
    for name, diagonal in expected.items():
        assert truth.relative_error(found[name], diagonal) < 1e-4, name


def test_labels_are_not_read():
    model, (x, y) = conv_net(), data((3, 9, 9))
    found = fp.gauss_newton_diagonal(model, [(x, y)])
    other = fp.gauss_newton_diagonal(model, [(x, torch.full_like(y, 99))])
    assert all(torch.equal(found[name], other[name]) for name in found)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_root_of_the_softmax_hessian(spread, classes):
    scores = torch.randn(20, classes) * spread
    columns = list(softmax_hessian_root(scores))
    assert len(columns) == classes - 1
    root = torch.stack(columns, 2).double()
    p = scores.double().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(root @ root.mT, hessian, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite_are_refused(bad):
    model, (x, y) = conv_net(), data((3, 9, 9))
    with torch.no_grad():
        model[-1].bias[2] = bad
    match = f"output must be finite, got .*{bad}.* for sample 0 of a batch"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)])


def test_a_network_that_is_sure_of_itself():
    model, (x, y) = conv_net(), data((3, 9, 9))
    with torch.no_grad():
        model[-1].bias[torch.randint(5, ())] = 20  # float32 can't tell its p from 1
    found = fp.gauss_newton_diagonal(model, [(x, y)])
    for name, diagonal in truth.gauss_newton_diagonal(model, x, found).items():
        assert truth.relative_error(found[name], diagonal) < 1e-4, name


def test_autocast_goes_back_in_bfloat16():
    model, (x, y) = conv_net(), data((3, 9, 9))
    expected = fp.gauss_newton_diagonal(model, [(x, y)])
    with torch.autocast("cpu", torch.bfloat16):
        found = fp.gauss_newton_diagonal(model, [(x, y)])
    for name, diagonal in expected.items():
        assert 0 < truth.relative_error(found[name], diagonal.double()) < 0.1, name


def test_everything_is_left_as_found():
    model, (x, y) = conv_net().train(), data((3, 9, 9))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    fp.gauss_newton_diagonal(model, [(x, y)])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


class Reshaped(nn.Module):
    """Class scores in another shape; inputs [N, 4]."""

    def __init__(self, shape):
        super().__init__()
        self.fc, self.shape = nn.Linear(4, 6), shape

    def forward(self, x):
        return self.fc(x)[:, : self.shape[0]].view(-1, *self.shape[1:])


@pytest.mark.parametrize("shape, came", [((1, 1), "4, 1"), ((1,), "4")])
def test_outputs_that_are_no_class_scores(shape, came):
    model, (x, y) = Reshaped(shape), data((4,), 4)
    match = rf"gauss_newton_diagonal: .* at least two classes, .* got \[{came}\]"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)], parameters={"fc": model.fc.weight})


def test_other_outputs_that_are_refused():
    model, (x, y) = Reshaped((6, 3, 2)), data((4,), 4)
    weight = {"fc": model.fc.weight}
    match = r"labels must be class numbers, integers \[4, 2\], .* got int64 \[4\]"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)], parameters=weight)
    model = Reshaped((6, 2))
    weight = {"fc": model.fc.weight}
    match = r"with the batch's 4 samples .* got Tensor \[12, 2\]"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)], parameters=weight)
    model.forward = lambda x: x
    with pytest.raises(fp.FisherpruneError, match="must depend on a parameter"):
        fp.gauss_newton_diagonal(model, [(x, y)], parameters=weight)
    model.forward = lambda x: [x]
    with pytest.raises(fp.FisherpruneError, match="first dimension, got list of "):
        fp.gauss_newton_diagonal(model, [(x, y)], parameters=weight)
    with pytest.raises(
        fp.FisherpruneError, match="gauss_newton_diagonal: batches must hold samples"
    ):
        fp.gauss_newton_diagonal(model, [], parameters=weight)


def test_an_error_of_the_tap_names_the_pass():
    model, (x, y) = conv_net(), data((3, 9, 9))
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    match = "gauss_newton_diagonal: a BatchNorm layer uses batch statistics"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)])


class Known(torch.autograd.Function):
    """``tanh`` whose backward pass is made of torch's functions."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Once(Known):
    """Says that it can be differentiated once."""

    backward = staticmethod(once_differentiable(Known.backward))


class Opaque(Known):
    """Takes its gradient without a graph, and does not say so."""

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return Known.backward(ctx, grad)


def hooked(hook):
    def run(x):
        y = x.tanh()
        if y.requires_grad:
            y.register_hook(hook)
        return y

    return run


def through(function):
    torch.manual_seed(1)
    layers = {"first": nn.Linear(6, 8), "last": nn.Linear(8, 4)}
    return Own(lambda m, x: m.last(function(m.first(x))), **layers)


@pytest.mark.parametrize("criterion", ["grasp", "prospr", "hutchinson_diag"])
def test_functions_without_second_derivatives_are_refused(criterion):
    """Autograd leaves their second derivatives out, without a word."""
    given = [(torch.randn(5, 6), torch.randint(4, (5,)))]
    wanted = fp.score(through(torch.tanh), given, criterion)["first.weight"]
    found = fp.score(through(Known.apply), given, criterion)["first.weight"]
    torch.testing.assert_close(found, wanted)
    for function in (Once, Opaque):
        match = f"autograd.Function {function.__name__} must give gradients that"
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.score(through(function.apply), given, criterion)
    found = fp.score(through(hooked(lambda g: g * 1.0)), given, criterion)
    torch.testing.assert_close(found["first.weight"], wanted)
    with pytest.raises(fp.FisherpruneError, match="a hook on a tensor .* must give"):
        fp.score(through(hooked(lambda g: g.detach() * 2)), given, criterion)


@pytest.mark.parametrize("criterion", ["grasp", "prospr", "hutchinson_diag"])
def test_hardsigmoid_has_second_derivatives(criterion):
    """Torch has none, and mobile networks have it in each block."""
    given = [(torch.randn(5, 6), torch.randint(4, (5,)))]

    def in_place(h):
        nn.functional.hardsigmoid(h, inplace=True)
        return h

    several = nn.Hardsigmoid(), lambda h: nn.functional.hardsigmoid(input=h), in_place
    wanted = fp.score(through(lambda h: (h / 6 + 0.5).clamp(0, 1)), given, criterion)
    for function in several:
        found = fp.score(through(function), given, criterion)
        torch.testing.assert_close(found["first.weight"], wanted["first.weight"])


class Normed(nn.Module):
    """A layer with the formula of ``weight_norm``, in plain words."""

    def __init__(self, layer):
        super().__init__()
        parts = layer.parametrizations.weight
        self.g, self.v, self.bias = parts.original0, parts.original1, layer.bias

    def forward(self, x):
        weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("criterion", ["grasp", "prospr", "hutchinson_diag"])
def test_weight_norm_has_second_derivatives(criterion):
    """Those of torch's function leave out that norms depend on weights."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    models = [nn.Sequential(m, nn.Tanh(), nn.Linear(8, 4)) for m in (layer, layer)]
    models[1][0], models[1][2] = Normed(layer), models[0][2]
    given = [(torch.randn(5, 6), torch.randint(4, (5,)))]
    parts = layer.parametrizations.weight
    named = {"g": parts.original0, "v": parts.original1}
    found, wanted = (fp.score(m, given, criterion, parameters=named) for m in models)
    for name in named:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-7)


def test_functions_that_stop_a_gradient_are_not_refused():
    class Stop(Known):
        @staticmethod
        def backward(ctx, grad):
            return torch.zeros_like(grad)

    given = [(torch.randn(5, 6), torch.randint(4, (5,)))]
    stopped = fp.score(through(Stop.apply), given, "grasp")["first.weight"]
    assert not stopped.any()
