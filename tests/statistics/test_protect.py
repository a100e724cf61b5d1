"""What every pass checks of its arguments, and what it leaves as it found it."""

import copy

import pytest
import torch
import truth
from checks import assert_moments, refused
from nets import Mixing, batches, conv_net, data
from torch import nn

import fisherprune as fp


def network():
    return Mixing(lambda _, h: torch.tanh(h))


def test_bad_arguments():
    model, (x, y) = conv_net(), data((3, 9, 9))
    for size in (0, -1, 1.5, True, "2"):
        refused(model, x, y, "group_size must be an integer", group_size=size)
    refused(model, x, y, r"group_size must be below 2\^63, got 118", group_size=2**70)
    refused(model, x, y, "at least one parameter", parameters={})
    stranger = {"w": nn.Parameter(torch.zeros(2))}
    refused(model, x, y, "'w' is no parameter of the model", parameters=stranger)
    refused(model, x, y[:5], "one label for each, got 13 inputs and 5 labels")
    refused(model, x[:0], y[:0], "at least one sample")
    refused(model, x, y - 9, r"labels must lie in \[0, 5\)")
    refused(model, x, y + 5, r"labels must lie in \[0, 5\)")
    refused(model, x * float("nan"), y, "loss must be finite, got nan for sample 0")
    with pytest.raises(fp.FisherpruneError, match="batches must hold samples"):
        fp.gradient_moments(model, [])
    with pytest.raises(fp.FisherpruneError, match="batch 1 is Tensor"):
        fp.gradient_moments(model, [(x, y), x])


def test_bad_parameters():
    x, y = data((3, 9, 9))
    match = "'0.weight' must be of floating-point numbers, got torch.complex64"
    refused(conv_net().to(torch.complex64), x, y, match)


def test_frozen_parameters_stay_frozen():
    model, (x, y) = conv_net(), data((3, 9, 9))
    chosen = dict(model.named_parameters())
    expected = truth.moments(model, x, y, chosen)
    model.requires_grad_(False)
    model[3].weight.requires_grad_(True)
    assert_moments(fp.gradient_moments(model, [(x, y)], parameters=chosen), expected)
    refused(model, x, y + 5, "labels must lie in", parameters=chosen)
    assert [n for n, p in chosen.items() if p.requires_grad] == ["3.weight"]


def test_models_that_are_none():
    x, y = data((4,))
    for model, came in ((torch.tanh, "builtin_function_or_method"), (None, "NoneType")):
        refused(model, x, y, f"model must be a torch.nn.Module, got {came}")
        with pytest.raises(fp.FisherpruneError, match="model must be a torch.nn.Mod"):
            fp.prunable_parameters(model)


def test_lazy_layers_must_have_run():
    model, (x, y) = nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 5)), data((4,))
    refused(model, x, y, "model must have run once, .*: '0.weight' has none yet")
    model(x)
    expected = truth.moments(model, x, y, ["0.weight"])
    assert_moments(fp.gradient_moments(model, [(x, y)]), expected)
    statistics = nn.Sequential(nn.Linear(4, 5), nn.LazyBatchNorm1d(affine=False))
    parameters = {"0.weight": statistics[0].weight}
    match = "model must have run once, .*: '1.running_mean' has none"
    refused(statistics, x, y, match, parameters=parameters)


def test_parameters_that_are_no_dict():
    model, (x, y) = network(), data((4,))
    for parameters, came in (
        (model.named_parameters(), "generator"),
        (list(model.parameters()), "list"),
        (["fc.weight"], "list"),
    ):
        match = f"must be a dict of the model's parameters by name, .* got {came}"
        refused(model, x, y, match, parameters=parameters)


def test_a_parameter_under_two_names_is_refused():
    model, (x, y) = Mixing(lambda m, h: torch.tanh(m.twin(h))), data((4,))
    model.twin = nn.Linear(4, 4)
    model.twin.weight = model.fc.weight
    twice = dict(model.named_parameters(remove_duplicate=False))
    match = "'fc.weight' and 'twin.weight' are one parameter: leave one out"
    refused(model, x, y, match, parameters=twice)


def test_batches_must_be_pairs_of_tensors():
    model, (x, y) = network(), data((4,))
    for wrong, came in (
        (None, "iterable of .inputs, labels. tensors, got NoneType"),
        (lambda: [(x, y)], "got function"),
        ([(x, y, y)], r"tuple of \(Tensor \[13, 4\], Tensor \[13\], Tensor \[13\]\)"),
        ([[x.numpy(), y.numpy()]], r"list of \(ndarray, ndarray\)"),
        (
            [(x, y.tolist())],
            r"\(Tensor \[13, 4\], list of \(int, int, int, int, ...\)\)",
        ),
        (torch.utils.data.TensorDataset(x, y), r"\(Tensor \[4\], Tensor \[\]\)"),
        ([{"x": x, "y": y}], "batch 0 is dict"),
    ):
        with pytest.raises(fp.FisherpruneError, match=came):
            fp.gradient_moments(model, wrong)


def test_gradient_hooks_are_refused():
    model, (x, y) = network(), data((4,))
    handle = model.fc.weight.register_hook(lambda grad: 2 * grad)
    match = r"'fc.weight' must have no gradient hook \(register_hook\)"
    refused(model, x, y, match)
    fp.gradient_moments(model, [(x, y)], parameters={"b": model.fc.bias})
    handle.remove()
    fp.gradient_moments(model, [(x, y)])


def test_a_hold_is_no_gradient_hook():
    model, (x, y) = conv_net(), data((3, 9, 9))
    masks = fp.prune(model, [(x, y)], "magnitude", 0.5)
    with masks.hold(model, torch.optim.SGD(model.parameters(), 0.1)):
        found = fp.gradient_moments(model, batches(x, y, 5))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    assert_moments(found, expected)


class Counting(Mixing):
    """Changes its buffers in eval mode too: in place, and by new tensors."""

    def __init__(self):
        super().__init__(None)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.ones(4))

    def forward(self, x):
        h = self.fc(x)
        self.seen += h.detach().square().mean().ceil().clamp(1, 1)
        self.average = self.average.lerp(h.detach().mean(0), 0.5)
        return self.head(h)


@pytest.mark.parametrize("criterion", ["fts", "grasp"])
def test_buffers_are_left_as_found(criterion):
    model, (x, y) = Counting(), data((4,))
    average = model.average
    before = dict(model.seen.__dict__)
    fp.score(model, batches(x, y, 5), criterion)
    assert model.seen == 0 and model.average is average and (average == 1).all()
    assert model.seen.__dict__ == before  # torch.save would write what is there
    model.forward = lambda x: 0 / 0
    with pytest.raises(fp.FisherpruneError, match="ZeroDivisionError"):
        fp.score(model, [(x, y)], criterion)
    assert model.seen == 0 and model.average is average


def test_runs_in_inference_mode():
    model, (x, y) = conv_net(), data((3, 9, 9))
    names = fp.prunable_parameters(model)
    expected = truth.moments(model, x, y, names)
    with torch.inference_mode():
        found = fp.gradient_moments(model, batches(x, y, 5))
        scores = fp.score(model, batches(x.clone(), y.clone(), 5), "grasp")
    assert_moments(found, expected)
    product = truth.hessian_gradient(model, x, y, names)
    for name, weight in names.items():
        wanted = weight.detach().double() * product[name]
        assert truth.relative_error(scores[name], wanted) < 1e-4


@pytest.mark.parametrize("criterion", fp.criteria()[1:])
def test_every_criterion_in_inference_mode(criterion):
    """Also in rounds, whose weights are those of the model for a while."""
    model, (x, y) = conv_net(), data((3, 9, 9))
    expected = fp.score(model, [(x, y)], criterion, seed=3)
    options = {"rounds": 2, "ties": "position"}
    (wanted,) = fp.find_masks(model, [(x, y)], criterion, [0.8], **options)
    with torch.inference_mode():
        found = fp.score(model, [(x.clone(), y.clone())], criterion, seed=3)
        (masks,) = fp.find_masks(model, [(x, y)], criterion, [0.8], **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert masks == wanted


def test_compiled_parts_run_as_written_and_stay_compiled():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    inner, (x, y) = network(), data((4,), samples=12)
    model = nn.Sequential(nn.Identity(), torch.compile(inner, backend=backend))
    parameters = {"fc.weight": inner.fc.weight}
    found = fp.gradient_moments(model, batches(x, y, 1), parameters=parameters)
    assert_moments(found, truth.moments(inner, x, y, parameters))
    assert not compiled
    model(x)
    assert len(compiled) == 1


class Merging(nn.Linear):
    """Changes its weight on the way to eval mode, as adapters that are merged do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += 1.0 if self.training and not mode else 0.0
        return super().train(mode)


class Busy(nn.Module):
    """Changes what it can in its forward pass; inputs [N, 4]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=0.1)
        self.fc, self.head = Merging(4, 4), nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("cache", None)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.calls.data += 1
        self.cache = x.detach() * 2
        self.register_buffer("more", torch.ones(2))
        self.scale.mul_(1)  # another version
        h = self.fc(x) * self.scale + self.embed(torch.arange(4)).mean(0)
        return self.head(h)


@pytest.mark.parametrize("compute", [fp.gradient_moments, fp.gauss_newton_diagonal])
def test_what_a_forward_pass_changes_is_put_back(compute):
    model, (x, y) = Busy().train(), data((4,))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kept = x.clone()
    compute(model, [(x, y)])
    after = model.state_dict()
    assert [*after] == [*before] and model.cache is None and not hasattr(model, "more")
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert torch.equal(x, kept) and all(m.training for m in model.modules())


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)])
def test_a_model_that_changes_its_input(first):
    model, (x, y) = nn.Sequential(first, nn.Linear(4, 6), nn.Linear(6, 5)), data((4,))
    kept = x.clone()
    found = fp.gradient_moments(model, batches(x, y, 5))
    assert torch.equal(x, kept)
    expected = truth.moments(model, x, y, found.mean)
    assert_moments(found, expected)


class Keeping(nn.Module):
    """Keeps what it computes, in several ways; inputs [N, 4]."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
        self.last, self.seen, self.calls = "nothing", [], 0
        self.by_name = {"first": (1, 2)}
        self.endless = [self.by_name]
        self.endless.append(self.endless)

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        self.last = self.fc.output = h
        self.seen.append(h)
        self.by_name["h"] = self.by_name["first"] = [{"h": (h,)}]
        self.calls += 1
        return self.head(h)


@pytest.mark.parametrize("criterion", ["fts", "snip", "grasp", "obd"])
def test_a_model_that_keeps_activations_can_be_copied(criterion):
    model, (x, y) = Keeping(), data((4,))
    seen, by_name = model.seen, model.by_name
    fp.score(model, [(x, y)], criterion)
    copy.deepcopy(model)
    assert model.last == "nothing" and not hasattr(model.fc, "output")
    assert model.seen is seen == [] and model.calls > 0
    assert model.by_name is by_name == {"first": (1, 2)}


def test_attributes_are_put_back_when_a_pass_fails():
    model, (x, y) = Keeping(), data((4,))
    refused(model, x, y + 5, "labels must lie in")
    copy.deepcopy(model)
    assert model.last == "nothing" and model.seen == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torchscript_runs_sample_by_sample():
    eager, (x, y) = conv_net().eval(), data((3, 9, 9))
    model = torch.jit.script(eager)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="once more for each sample alone"):
        found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, truth.moments(eager, x, y, [*named]))
    assert set(fp.check(model, (x, y)).ways.values()) == {("loop",)}
