"""Passes on a GPU against float64 on the CPU, in every way in which they may run."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from gpus import CYCLES, DEVICES, needs_gpu
from nets import batches, data, randomized
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherprune as fp
from fisherprune.statistics.gauss_newton import gauss_newton_diagonal
from fisherprune.statistics.hessian_gradient import hessian_gradient_product

pytestmark = pytest.mark.usefixtures("one_thread", "ieee")
CLASSES = 5
SIZES = (5, 5, 3)
"""Of batches; groups of four run on over their ends."""


@pytest.fixture
def ieee(tf32):
    tf32("ieee")


class Residual(nn.Module):
    """A small ResNet, smooth: rounding switches no ReLU; inputs [N, 3, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.first_norm = convolution(8, 16, 3), nn.BatchNorm2d(16)
        self.second, self.second_norm = convolution(16, 16, 3), nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(convolution(8, 16, 1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        h = F.silu(self.first_norm(self.first(x)))
        h = F.silu(self.second_norm(self.second(h)) + self.shortcut(x))
        return self.head(h.mean((2, 3)))


def convolution(c, o, kernel):
    stride, padding = o // c, kernel // 2
    return nn.Conv2d(c, o, kernel, stride, padding, bias=False)


class Transformer(nn.Module):
    """Two layers of attention over tokens; inputs [N, T], whole numbers as floats."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 12), nn.Embedding(6, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, F.gelu, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.layers(self.tokens(x.long()) + places).mean(1))


def residual():
    x, y = data((3, 8, 8), sum(SIZES), CLASSES)
    return randomized(Residual()).eval(), x, y


def transformer():
    x = torch.randint(11, (sum(SIZES), 6)).float()
    return Transformer().eval(), x, torch.randint(CLASSES, (sum(SIZES),))


MODELS = {"residual": residual, "transformer": transformer}


@pytest.fixture(params=MODELS)
def case(request):
    """Return a model, inputs and labels, on the CPU."""
    return MODELS[request.param]()


def on(device, model, x, y):
    """Return a copy of the model and the batches, there."""
    return copy.deepcopy(model).to(device), batches(x.to(device), y.to(device), 5)


def on_cpu(found):
    return {name: tensor.cpu() for name, tensor in found.items()}


def moments_on(device, case, **options):
    model, some = on(device, *case)
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, some, parameters=parameters, **options)
    assert {sum.device for sum in found.sum.values()} == {some[0][0].device}
    return SimpleNamespace(mean=on_cpu(found.mean), fisher=on_cpu(found.fisher))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [1, 4])
def test_moments(case, group_size, device):
    found = moments_on(device, case, group_size=group_size)
    assert_moments(found, truth_of(case, group_size), 1e-4)


def truth_of(case, group_size=1):
    model, x, y = case
    names = [name for name, _ in model.named_parameters()]
    return truth.moments(model, x, y, names, group_size)


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_channels_last(device):
    model, x, y = residual()
    model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    found = moments_on(device, (model, x, y), group_size=4)
    assert_moments(found, truth_of((model, x, y), 4), 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moments_under_autocast(case, dtype, device):
    with torch.autocast(torch.device(device).type, dtype):
        found = moments_on(device, case)
    assert_moments(found, truth_of(case), 0.1 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize("device", DEVICES)
def test_second_order(case, device):
    (model, x, y), names = case, fp.prunable_parameters(case[0])
    there, some = on(device, *case)
    found = {
        "grasp": hessian_gradient_product(there, some),
        "obd": gauss_newton_diagonal(there, some),
    }
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        expected = {
            "grasp": truth.hessian_gradient(model, x, y, names),
            "obd": truth.gauss_newton_diagonal(model, x, names),
        }
    for what, tensors in expected.items():
        for name, tensor in tensors.items():
            error = truth.relative_error(found[what][name].cpu(), tensor)
            assert error < 1e-4, (what, name)


@pytest.mark.parametrize("device", DEVICES)
def test_every_criterion_scores_as_on_the_cpu(case, device):
    codes = {*fp.criteria()} - {"none"}
    if isinstance(case[0], Transformer):  # attention's weights can't be drawn anew
        codes -= {"ntk_sap", "synflow"}  # nor is its flow positive
    found, expected = (
        fp.score_all(*on(where, *case), codes) for where in (device, "cpu")
    )
    for code, scores in expected.items():
        for name, wanted in scores.items():
            error = truth.relative_error(found[code][name].cpu(), wanted.double())
            assert error < 1e-3, (code, name)


def graph_moments(device, case, batch=4, **options):
    """Return moments with a graph and without; the last batch is smaller."""
    model, x, y = case
    model = copy.deepcopy(model).to(device)
    some = batches(x.to(device), y.to(device), batch)
    options = {"parameters": fp.prunable_parameters(model)} | options
    expected = fp.gradient_moments(model, some, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fp.FisherpruneWarning)  # why there is none
        return fp.gradient_moments(model, some, cuda_graph=True, **options), expected


def longer(case, count):
    model, x, y = case
    picked = torch.randint(len(x), (count,))
    return model, x[picked], y[picked]


def assert_like(found, expected, tolerance=1e-5):
    assert found.samples == expected.samples and found.groups == expected.groups
    for kind in ("mean", "fisher"):
        for name, wanted in getattr(expected, kind).items():
            error = truth.relative_error(getattr(found, kind)[name], wanted.double())
            assert error < tolerance, (kind, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [1, 4])
def test_moments_of_a_graph(case, group_size, device, cpu_graphs):
    case = longer(case, 4 * 6 + 3)
    assert_like(*graph_moments(device, case, group_size=group_size))


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_a_graph_of_many_groups(device, cpu_graphs):
    assert_like(*graph_moments(device, longer(residual(), 4 * 700 + 3), 700))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moments_of_a_graph_under_autocast(case, dtype, device, cpu_graphs):
    with torch.autocast(torch.device(device).type, dtype):
        found, expected = graph_moments(device, longer(case, 4 * 6 + 3))
    assert_like(found, expected, 0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_a_graph_of_channels_last(device, cpu_graphs):
    model, x, y = longer(residual(), 4 * 6 + 3)
    model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    assert_like(*graph_moments(device, (model, x, y)))


@needs_gpu
def test_a_graph_beside_a_loader_that_pins_memory():
    model, x, y = longer(residual(), 4 * 6 + 3)
    model = model.to("cuda")
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, pin_memory=True)
    expected = fp.gradient_moments(model, loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fp.FisherpruneWarning)
        found = fp.gradient_moments(model, loader, cuda_graph=True)
    assert_like(found, expected)


class Waits(Residual):
    """No function that is called waits, but one that it calls does."""

    def forward(self, x):
        return super().forward(x + 0 * torch.linalg.inv(torch.eye(2).to(x)).sum())


@needs_gpu
def test_a_model_that_waits_runs_without_a_graph():
    _, x, y = longer(residual(), 4 * 6)
    model, some = on("cuda", randomized(Waits()).eval(), x, y)
    expected = fp.gradient_moments(model, some)
    with pytest.warns(fp.FisherpruneWarning, match="without a graph, as ever"):
        found = fp.gradient_moments(model, some, cuda_graph=True)
    assert_like(found, expected)
    torch.cuda.empty_cache()  # the allocator is as it was


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [2, 4])
def test_an_error_in_a_batch_of_a_graph(number, device, cpu_graphs):
    model, x, y = longer(residual(), 4 * 7)
    y[4 * number + 1] = CLASSES
    model = model.train().to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    some = batches(x.to(device), y.to(device), 4)
    with pytest.raises(fp.FisherpruneError, match=f"labels must .* to {CLASSES}"):
        fp.gradient_moments(model, some, cuda_graph=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@needs_gpu
def test_a_pass_runs_on_the_current_stream():
    """Its images come late, by the same stream."""
    case, side = residual(), torch.cuda.Stream()
    model, some = on("cuda", *case)

    def late():
        for x, y in some:
            torch.cuda._sleep(CYCLES)
            there = torch.zeros_like(x)
            yield there.copy_(x), y

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        parameters = dict(model.named_parameters())
        found = fp.gradient_moments(model, late(), parameters=parameters)
    side.synchronize()
    found = SimpleNamespace(mean=on_cpu(found.mean), fisher=on_cpu(found.fisher))
    assert_moments(found, truth_of(case), 1e-4)


@needs_gpu
def test_no_batch_waits_for_the_device():
    """But the first, of which one sample runs alone."""
    model, (first, *_) = on("cuda", *residual())
    parameters = dict(model.named_parameters())

    def batches():
        yield first
        torch.cuda.set_sync_debug_mode("error")
        yield from [first] * 4
        torch.cuda.set_sync_debug_mode("default")

    try:
        fp.gradient_moments(model, batches(), parameters=parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
