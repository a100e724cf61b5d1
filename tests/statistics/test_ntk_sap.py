"""NTK-SAP's derivatives against closed forms and against float64."""

import copy
import hashlib
import math

import pytest
import torch
import truth
from nets import Own, batches, data
from torch import nn

import fisherprune as fp
from fisherprune import models
from fisherprune.masks.counts import keep_count
from fisherprune.statistics.passes import Task
from fisherprune.statistics.run import statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


def derivatives(model, inputs, parameters=None, seed=0, masks=None, **settings):
    """Return K by parameter name."""
    several = [(x, torch.zeros(len(x))) for x in inputs]
    parameters = parameters or fp.prunable_parameters(model)
    options = {"settings": fp.Settings(**settings), "seed": seed, "masks": masks}
    task = Task(model, several, parameters, **options)
    return statistics_of(task, ["ntk_sap"]).parts["K"]


def assert_near(found, expected, spread, draws):
    """Compare a mean of draws with its expectation, at six standard deviations."""
    assert (found - expected).abs().max() < 6 * spread / math.sqrt(draws)


def test_of_one_convolution_it_counts_the_positions():
    """E K is twice the number of positions that the weight is used at, times E x^2."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten())
    weight, x = {"0.weight": model[0].weight}, torch.zeros(50, 1, 4, 3)
    rows, columns = (torch.tensor([n - 1, n, n - 1]) for n in (4, 3))
    expected = 2.0 * rows[:, None] * columns
    found = derivatives(model, [x], weight, ntk_draws=150)["0.weight"]
    # The steps are drawn once for each draw: d^2 has the variance 2.
    assert_near(found, expected.expand(2, 1, 3, 3), 2 * expected.max(), 150)
    assert (found > 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_can_not_draw_weights():
    script = torch.jit.script(nn.Linear(3, 4))
    model, x = nn.Sequential(script, nn.Linear(4, 2)), torch.zeros(5, 3)
    named = {"1.weight": model[1].weight}
    match = r"0 \(RecursiveScriptModule\) must have .* that draws weight, bias: write"
    with pytest.raises(fp.FisherpruneError, match=match):
        derivatives(model, [x], named)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_can_not_be_drawn():
    """Their modules draw what they compute, and leave the parameters as they are."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(5, 3)
    nn.utils.weight_norm(model[0])
    named = {"1.weight": model[1].weight}
    with pytest.raises(fp.FisherpruneError, match="can be copied, but .* weight_norm"):
        derivatives(model, [x], named)
    with torch.no_grad():
        model(x)
    match = r"0 \(Linear\) must have .* that draws weight_g, weight_v: write"
    with pytest.raises(fp.FisherpruneError, match=match):
        derivatives(model, [x], named)


def test_all_parameters_are_drawn_by_methods_of_any_kind():
    """By torch's private ones too, and by ones that write ``.data``."""

    class Scale(nn.Linear):
        def reset_parameters(self):
            self.weight.data.uniform_(1, 2)
            self.bias.data.zero_()

    torch.manual_seed(0)
    model = nn.Sequential(
        Scale(4, 4), nn.TransformerEncoderLayer(4, 2, 8, 0, batch_first=True)
    )
    given = [torch.zeros(6, 3, 4)]
    found = derivatives(model, given, dict(model.named_parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    again = derivatives(model, given, dict(model.named_parameters()))
    assert all(torch.equal(again[n], found[n]) for n in found)
    assert found["1.self_attn.in_proj_weight"].any()


def test_of_a_linear_network_it_is_the_norm_of_what_follows():
    """With f = B A x and d for A alone, E K_ij = 2 E |B_i|^2; B is uniform anew."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(100)  # which plays no part
    found = derivatives(model, [torch.zeros(40, 3)], ntk_draws=200)["0.weight"]
    variance = 1 / (3 * 4)  # of U(-1/2, 1/2), as nn.Linear draws for 4 inputs
    expected = torch.full((4, 3), 2 * 5 * variance)
    assert_near(found, expected, 3 * expected.max(), 200)


def test_two_weights_by_hand():
    """With f = c w x, which moves by e c d x: K = 2 c d^2 x^2, whatever w and e are."""
    model, size = nn.Linear(2, 1, bias=False), torch.zeros(3, 2)
    named = {"weight": model.weight}
    found = derivatives(model, [size], named, seed=4)["weight"]
    x, d = drawn(4, [(3, 2), (1, 2)])
    moved = (d * x).sum(1, keepdim=True)
    torch.testing.assert_close(found, (2 * moved * d * x).mean(0, keepdim=True))
    other = derivatives(model, [size], named, seed=4, ntk_epsilon=0.5)["weight"]
    torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)


def seed_of(seed, name):
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def drawn(seed, shapes, which="0.0"):
    """Return the normal numbers of a draw: inputs, then steps by parameter."""
    generator = torch.Generator().manual_seed(seed_of(seed, f"ntk_sap {which}"))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def redrawn(model, seed, which="0.0"):
    """Return a float64 copy whose modules have drawn their weights."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, f"ntk_sap weights {which}"))
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model.double()


def with_own_statistics(model, x):
    """Give BatchNorm layers the statistics of ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def in_float64(model, names, shape, epsilon, seed, masks, which="0.0"):
    """Return K of one draw, by the derivative of f's distance for explicit masks."""
    shapes = [shape, *(model.get_parameter(n).shape for n in names)]
    x, *steps = (t.double() for t in drawn(seed, shapes, which))
    model = redrawn(model, seed, which)
    named = dict(model.named_parameters())
    for name in names:
        named[name].data *= masks[name]
    with_own_statistics(model, x)
    ones = [masks[n].double().requires_grad_() for n in names]
    outputs = []
    for by in (0.0, epsilon):
        own = {
            n: c * (named[n].detach() + by * d)
            for n, c, d in zip(names, ones, steps, strict=True)
        }
        outputs.append(torch.func.functional_call(model, own, (x,)))
    distance = (outputs[0] - outputs[1]).square().sum() / epsilon**2 / len(x)
    grads = torch.autograd.grad(distance, ones)
    return {n: g * masks[n] for n, g in zip(names, grads, strict=True)}


NETS = {"resnet20": models.resnet20, "vgg11": models.vgg11}


@pytest.mark.parametrize(
    "net, pruned", [("resnet20", False), ("resnet20", True), ("vgg11", False)]
)
def test_masks_equal_those_of_float64(net, pruned):
    model, (x, _) = NETS[net](), data((3, 8, 8), 4)
    names = fp.prunable_parameters(model)
    masks = {
        n: torch.rand(p.shape) < 0.4 if pruned else torch.ones(p.shape, dtype=bool)
        for n, p in names.items()
    }
    expected = in_float64(model, names, x.shape, 0.01, 7, masks)
    found = derivatives(model, [x], seed=7, masks=masks if pruned else None)
    total = sum(p.numel() for p in names.values())
    kept = fp.select_masks({n: k.abs() for n, k in found.items()}, 0.9, ties="position")
    absolute = {n: k.abs() for n, k in expected.items()}
    wanted = truth.keep_largest(absolute, keep_count(total, 0.9))
    same = sum(int((kept[n] == wanted[n]).sum()) for n in names)
    assert same >= 0.999 * total, same / total
    assert not any(found[n][~masks[n]].any() for n in names)


def test_a_mean_over_batches_and_draws():
    x, _ = data((3, 8, 8), 5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    both = derivatives(model, [x[:3], x[3:]], seed=1, ntk_draws=2)["0.weight"]
    first = derivatives(model, [x[:3]], seed=1, ntk_draws=2)["0.weight"]
    once = derivatives(model, [x[:3]], seed=1)["0.weight"]
    names = ["0.weight"]
    ones = {"0.weight": torch.ones(4, 3, 3, 3)}
    exact = in_float64(model, names, (3, 3, 8, 8), 0.01, 1, ones)["0.weight"]
    assert truth.relative_error(once, exact) < 1e-3
    shapes = {"0.0": 3, "0.1": 3, "1.0": 2, "1.1": 2}
    each = {
        which: n
        * in_float64(model, names, (n, 3, 8, 8), 0.01, 1, ones, which)["0.weight"]
        for which, n in shapes.items()
    }
    mean = sum(each.values()) / sum(shapes.values())
    assert truth.relative_error(both, mean) < 1e-3
    mean = (each["0.0"] + each["0.1"]) / 6
    assert truth.relative_error(first, mean) < 1e-3


def test_neither_weights_nor_images_nor_labels_count():
    model, (x, y) = models.resnet20(), data((3, 8, 8), 4)
    found = fp.score(model, [(x, y)], "ntk_sap", seed=3)
    other = fp.score(
        models.resnet20(), [(x + 1, torch.full_like(y, 99))], "ntk_sap", seed=3
    )
    assert all(torch.equal(s, other[n]) for n, s in found.items())
    another = fp.score(model, [(x, y)], "ntk_sap", seed=4)
    assert not any(torch.equal(s, another[n]) for n, s in found.items())
    fp.score(model, batches(x[:3], y[:3], 2), "ntk_sap")  # a batch of one sample


def test_everything_is_left_as_found():
    model, (x, y) = models.resnet20().train(), data((3, 8, 8), 4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    fp.score(model, [(x, y)], "ntk_sap")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_in_inference_mode():
    model, (x, y) = models.resnet20(), data((3, 8, 8), 4)
    expected = fp.score(model, [(x, y)], "ntk_sap")
    with torch.inference_mode():
        found = fp.score(model, [(x.clone(), y.clone())], "ntk_sap")
    assert all(torch.equal(s, expected[n]) for n, s in found.items())


def test_mistakes():
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), data((4,), 8)
    refused = [
        ([], {}, "ntk_sap: batches must hold samples, got none"),
        ([(x.long(), y)], {}, "inputs must be of floating-point numbers, .* torch.int"),
        (
            [(x, y)],
            {"losses": lambda model, batch: model(batch[0])[:, 0]},
            "losses must be left out for the pass ntk_sap",
        ),
    ]
    for several, options, match in refused:
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.score(model, several, "ntk_sap", **options)
    own = Own(lambda m, x: (m.fc(x),), fc=nn.Linear(4, 3), head=nn.Linear(3, 2))
    with pytest.raises(fp.FisherpruneError, match="first dimension, got .*tuple"):
        fp.score(own, [(x, y)], "ntk_sap")
    own.bias = nn.Parameter(torch.zeros(3))
    match = (
        r"ntk_sap draws .* model \(Own\) must have .* reset_parameters\(\) that draws "
    )
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.score(own, [(x, y)], "ntk_sap")
    with pytest.raises(fp.FisherpruneError, match="ntk_draws must be an integer of at"):
        fp.Settings(ntk_draws=0)
    with pytest.raises(fp.FisherpruneError, match="ntk_epsilon must be a number above"):
        fp.Settings(ntk_epsilon=0.0)
