"""GraSP's product of Hessian and gradient against float64 autograd."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import Own, batches, conv_net, data, randomized
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherprune as fp
from fisherprune import models
from fisherprune.masks.counts import keep_count
from fisherprune.statistics.hessian_gradient import hessian_gradient_product

pytestmark = pytest.mark.usefixtures("one_thread")


def named_flow(model, flow):
    """Return the names of a flow in a network that has no other layers."""
    if flow == "scored":
        return [*fp.prunable_parameters(model)]
    kinds = nn.Conv2d | nn.Linear
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if flow == "trainable" or own == "weight" and isinstance(module, kinds)
    ]


@pytest.mark.parametrize("flow", ["trainable", "weights", "scored"])
@pytest.mark.parametrize("group_size", [1, 3, 20])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_it_equals_double_backpropagation(flow, group_size, size):
    model, (x, y) = conv_net(), data((3, 9, 9))
    names = fp.prunable_parameters(model)
    options = {"group_size": group_size, "flow": flow}
    expected = truth.hessian_gradient(
        model, x, y, names, group_size, named_flow(model, flow)
    )
    found = hessian_gradient_product(model, iter(batches(x, y, size)), **options)
    assert list(found) == list(names)
    for name, product in expected.items():
        assert found[name].dtype == torch.float32
        assert truth.relative_error(found[name], product) < 1e-4, name


def test_two_weights_by_hand():
    """With f = b (a x) and L = f: m = (b x, a x), H = ((0, x), (x, 0))."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    (a, b), x = torch.randn(2, 1).tolist(), torch.randn(1, 1)
    with torch.no_grad():
        model[0].weight.fill_(a[0]), model[1].weight.fill_(b[0])
    options = {"loss_fn": lambda outputs, labels: outputs.sum()}
    flow, square = [(x, torch.zeros(1))], float(x**2)
    found = hessian_gradient_product(model, flow, **options)
    assert found["0.weight"].item() == pytest.approx(square * a[0], rel=1e-5)
    scores = fp.score(model, flow, "grasp", **options)
    assert scores["0.weight"].item() == pytest.approx(square * a[0] ** 2, rel=1e-5)
    alone = hessian_gradient_product(model, flow, flow="scored", **options)
    assert alone["0.weight"].item() == 0  # linear in the first weight alone
    two = {n: p for n, p in model.named_parameters()}
    both = hessian_gradient_product(model, flow, parameters=two, **options)
    assert both["1.weight"].item() == pytest.approx(square * b[0], rel=1e-5)
    cooled = hessian_gradient_product(model, flow, temperature=4, **options)
    assert cooled["0.weight"].item() == pytest.approx(square * a[0] / 16, rel=1e-5)


NETS = {"resnet20": models.resnet20, "vgg11": models.vgg11}


@pytest.mark.parametrize(
    "net, flow, temperature",
    [
        ("resnet20", "trainable", 1),
        ("vgg11", "trainable", 1),
        ("resnet20", "weights", 200),
    ],
)
def test_masks_equal_those_of_float64(net, flow, temperature):
    """The published FTS code's definition, and that of the published GraSP code."""
    model, (x, y) = randomized(NETS[net]()), data((3, 8, 8), 4, 10)
    names = fp.prunable_parameters(model)

    def cooled(outputs, labels):
        return F.cross_entropy(outputs / temperature, labels)

    named = named_flow(model, flow)
    products = truth.hessian_gradient(model, x, y, names, 1, named, cooled)
    settings = fp.Settings(flow=flow, temperature=temperature)
    found = fp.score_all(
        model, [(x, y)], ["grasp", "grasp_reversed"], settings=settings
    )
    total = sum(p.numel() for p in names.values())
    for sign, code in ((1, "grasp"), (-1, "grasp_reversed")):
        wanted = truth.keep_largest(
            {n: sign * p.detach().double() * products[n] for n, p in names.items()},
            keep_count(total, 0.9),
        )
        masks = fp.select_masks(found[code], 0.9, ties="position")
        same = sum(int((masks[n] == wanted[n]).sum()) for n in names)
        assert same >= 0.999 * total, (code, same / total)


class Redrawn:
    """Yields the next of several lists of batches each time."""

    def __init__(self, *lists):
        self.lists = iter(lists)

    def __iter__(self):
        return iter(next(self.lists))


def test_batches_that_hold_other_samples_the_second_time():
    model, (x, y) = conv_net(), data((3, 9, 9), samples=40)
    drawn, other = batches(x[:20], y[:20], 5), batches(x[20:], y[20:], 5)
    hessian_gradient_product(model, Redrawn(drawn, drawn[::-1]))
    hessian_gradient_product(model, Redrawn(drawn, batches(x[:20], y[:20], 7)))
    with pytest.raises(fp.FisherpruneError, match="but their gradient is another"):
        hessian_gradient_product(model, Redrawn(drawn, other))
    match = "hessian_gradient_product: .* same 20 samples again, got 5"
    with pytest.raises(fp.FisherpruneError, match=match):
        hessian_gradient_product(model, Redrawn(drawn, drawn[:1]))


def test_a_gradient_that_cancels_out_is_the_same_again():
    """Of inputs and their negatives the mean gradient is rounding errors alone."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(30, 4)
    both = torch.stack([x, -x], 1).flatten(0, 1)
    halves = [(both[:33], both[:33, 0]), (both[33:], both[33:, 0])]
    options = {"loss_fn": lambda outputs, labels: outputs.sum()}
    weight = {"0.weight": model[0].weight}
    found = hessian_gradient_product(
        model,
        Redrawn(halves, halves[::-1]),
        parameters=weight,
        flow="scored",
        **options,
    )
    assert not found["0.weight"].any()


def test_frozen_parameters_are_no_part_of_the_flow_unless_scored():
    model, (x, y) = conv_net(), data((3, 9, 9))
    frozen = [model[0].weight, model[0].bias, model[12].weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    names = {"0.weight": model[0].weight, "3.weight": model[3].weight}
    rest = [n for n, p in model.named_parameters() if p.requires_grad]
    expected = truth.hessian_gradient(model, x, y, names, 1, rest)
    found = hessian_gradient_product(model, [(x, y)], parameters=names)
    for name, product in expected.items():
        assert truth.relative_error(found[name], product) < 1e-4, name
    assert not any(p.requires_grad for p in frozen)


def test_a_parameter_of_two_layers_counts_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model, (x, y) = nn.Sequential(first, nn.Tanh(), second, nn.Tanh()), data((4,), 9, 4)
    names = {"2.bias": second.bias}
    expected = truth.hessian_gradient(model, x, y, names)
    found = hessian_gradient_product(model, [(x, y)], parameters=names)
    assert truth.relative_error(found["2.bias"], expected["2.bias"]) < 1e-4


def test_weights_of_float64_are_left_as_they_are():
    model, (x, y) = conv_net().double(), data((3, 9, 9))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    names = fp.prunable_parameters(model)
    expected = truth.hessian_gradient(model, x, y, names)
    found = hessian_gradient_product(model, batches(x.double(), y, 5))
    for name, product in expected.items():
        assert truth.relative_error(found[name], product) < 1e-5, name
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Attention(nn.Module):
    """Fused attention between linear layers; inputs [N, T, 4]."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 24), nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.head(h.squeeze(1).mean(1))


def test_fused_attention():
    model, (x, y) = Attention(), data((6, 4))
    names = fp.prunable_parameters(model)
    found = hessian_gradient_product(model, batches(x, y, 4))
    with sdpa_kernel(SDPBackend.MATH):
        expected = truth.hessian_gradient(model, x, y, names)
    for name, product in expected.items():
        assert truth.relative_error(found[name], product) < 1e-4


class PositionsLast(nn.Module):
    """BatchNorm whose gradient arrives expanded over positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)
        randomized(self)

    def forward(self, x):
        h = self.bn(self.conv(x).relu())
        return self.head(h.flatten(2).transpose(1, 2).mean(1))


@pytest.mark.parametrize("sizes", [[1], [4, 1], [1, 1, 3]])
def test_batches_of_one_sample(sizes):
    net = PositionsLast()
    x, y = torch.randn(sum(sizes), 2, 6, 6), torch.randint(3, (sum(sizes),))
    several = list(zip(x.split(sizes), y.split(sizes), strict=True))
    named = dict(net.named_parameters())
    product = hessian_gradient_product(net, several, parameters=named)
    expected = truth.hessian_gradient(net, x, y, [*named])
    for name in named:
        error = (product[name] - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("scale", [1e-10, 1e-17, 1e-25, 1e-36, 1e20])
@pytest.mark.parametrize("flow", ["trainable", "scored"])
def test_gradients_far_from_one(scale, flow):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    (x, y), names = data((4,)), {"0.weight": model[0].weight}
    expected = truth.hessian_gradient(model, x, y, names, 1, named_flow(model, flow))
    scores = fp.score(
        model,
        batches(x, y, 5),
        "grasp",
        loss_fn=lambda outputs, labels: F.cross_entropy(outputs, labels) * scale,
        settings=fp.Settings(flow=flow),
    )["0.weight"].double()
    wanted = names["0.weight"].detach().double() * expected["0.weight"]
    angle = F.cosine_similarity(scores.flatten(), wanted.flatten(), dim=0, eps=0)
    assert angle > 1 - 1e-6


def test_large_gradients_beside_small_ones():
    """What is scored is 1e-30 times smaller than the others of the flow."""

    def forward(m, x):
        return m.head(x[:, :1].expand(-1, 6)) + 1e-30 * m.head(m.fc(x).tanh())

    model = Own(forward, fc=nn.Linear(4, 6), head=nn.Linear(6, 5))
    (x, y), names = data((4,)), {"fc.weight": model.fc.weight}
    expected = truth.hessian_gradient(model, x, y, names)["fc.weight"]
    found = hessian_gradient_product(model, [(x, y)], parameters=names)["fc.weight"]
    assert truth.relative_error(found.double() * 1e30, expected * 1e30) < 1e-4


def test_temperature_divides_the_outputs_of_any_loss():
    model, (x, y) = conv_net(), data((3, 9, 9))
    names = fp.prunable_parameters(model)

    def squares(outputs, labels):
        return (outputs - 1).square().sum(1).mean()

    expected = truth.hessian_gradient(
        model,
        x,
        y,
        names,
        1,
        None,
        lambda outputs, labels: squares(outputs / 7, labels),
    )
    found = hessian_gradient_product(model, [(x, y)], squares, temperature=7)
    for name, product in expected.items():
        assert truth.relative_error(found[name], product) < 1e-4, name


def test_mistakes():
    model, (x, y) = conv_net(), data((3, 9, 9))
    options = {"losses": lambda model, batch: model(batch[0]).logsumexp(1)}
    for call in (
        lambda: hessian_gradient_product(model, [(x, y)], temperature=200, **options),
        lambda: fp.score(
            model, [(x, y)], "grasp", settings=fp.Settings(temperature=200), **options
        ),
    ):
        match = "temperature must be 1 where losses is given, which must .*, got 200"
        with pytest.raises(fp.FisherpruneError, match=match):
            call()
    match = "flow must be one of trainable, weights, scored, got 'all'"
    with pytest.raises(fp.FisherpruneError, match=match):
        hessian_gradient_product(model, [(x, y)], flow="all")
    for wrong in (0, -1.0, float("inf"), float("nan"), "2", True):
        with pytest.raises(fp.FisherpruneError, match="temperature must be a number"):
            fp.Settings(temperature=wrong)
    handle = model[12].bias.register_hook(lambda grad: grad * 2)
    match = r"'12.bias \(not scored\)' must have no gradient hook"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.score(model, [(x, y)], "grasp")
    fp.score(model, [(x, y)], "grasp", settings=fp.Settings(flow="scored"))
    handle.remove()
    with pytest.raises(fp.FisherpruneError, match="batches must hold samples, got non"):
        fp.score(model, [], "grasp")
    model[9] = nn.utils.parametrizations.weight_norm(model[9])
    named = {"0.weight": model[0].weight}
    match = "flow must be trainable or scored where a weight is computed .*'weights'"
    with pytest.raises(fp.FisherpruneError, match=match):
        hessian_gradient_product(model, [(x, y)], parameters=named, flow="weights")


def test_samples_that_mix():
    model, (x, y) = conv_net(), data((3, 9, 9))
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        hessian_gradient_product(model, [(x, y)])


def test_grasp_runs_no_other_pass():
    model, (x, y) = conv_net(), data((3, 9, 9))
    read = []

    class Read:
        def __iter__(self):
            read.append(1)
            return iter([(x, y)])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.score(model, Read(), "grasp")
    assert len(read) == 2
