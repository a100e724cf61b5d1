"""Both functions leave the model as found, take any example, and explain mistakes."""

import copy
import doctest
import inspect

import pytest
import torch
from nets import TwiceNet, conv_net
from torch import nn

import fisherprune as fp
from fisherprune.errors import FieldError, FisherpruneError


@pytest.mark.parametrize("function", [fp.flops, fp.effective_masks])
def test_examples_of_docstrings_show_what_comes(function):
    result = doctest.testmod(inspect.getmodule(function))
    assert result.attempted and not result.failed


BOTH = pytest.mark.parametrize("function", [fp.flops, fp.effective_masks])


def half(model):
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    own = dict(model.named_parameters())
    return fp.Masks({name: torch.rand(own[name].shape) < 0.5 for name in names})


@BOTH
def test_the_model_is_left_as_found(function):
    model, masks = conv_net(), None
    masks, x = half(model), torch.randn(2, 3, 9, 9)
    model(x).sum().backward()
    model[3].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model]
    kept = {n: (p, p.data_ptr(), p.grad.clone()) for n, p in model.named_parameters()}
    frozen = model[0].weight.requires_grad_(False)
    random, before = torch.random.get_rng_state(), x.clone()
    bits = {name: mask.clone() for name, mask in masks.items()}
    function(model, x, masks)
    for name, p in model.named_parameters():
        same, place, grad = kept[name]
        assert p is same and p.data_ptr() == place and torch.equal(p.grad, grad)
        assert p.requires_grad == (p is not frozen) and p.is_leaf
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [m.training for m in model] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(x, before) and masks == bits
    assert torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled


@BOTH
def test_an_example_that_the_model_changes(function):
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), -torch.ones(1, 3)
    function(model, x, half(model))
    assert torch.equal(x, -torch.ones(1, 3))


@BOTH
def test_twice_is_the_same(function):
    model = TwiceNet()
    masks, x = half(model), torch.randn(1, 4, 8, 8)
    assert function(model, x, masks) == function(model, x, masks)


@BOTH
def test_weights_that_are_held_and_gradients_that_are_off(function):
    model = conv_net()
    masks, x = half(model), torch.randn(2, 3, 9, 9)
    free = function(model, x, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.hold(model, optimizer):
        with torch.no_grad():
            assert function(model, x, masks) == free
        model(x).sum().backward()
        optimizer.step()
        for name, mask in masks.items():
            assert not model.get_parameter(name)[~mask].any()
    with torch.inference_mode():
        assert function(model, x, masks) == free


@BOTH
def test_models_that_are_wrapped(function):
    model = TwiceNet()
    masks, x = half(model), torch.randn(1, 4, 8, 8)
    plain = function(model, x, masks)
    wrapped = {f"module.{name}": mask for name, mask in masks.items()}
    assert function(torch.compile(model), x, masks) == plain
    found = function(nn.DataParallel(model), x, wrapped)
    if function is fp.flops:
        assert found == plain
    else:
        assert list(found) == list(wrapped) and found.kept() == plain.kept()


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, *, scale=None, odd="no tensor"):
        return {"out": [self.fc(x) if scale is None else self.fc(x) * scale], "x": odd}


@BOTH
def test_examples_of_several_arguments(function):
    model, x = Several(), torch.randn(1, 3)
    masks = {"fc.weight": torch.tensor([[True, False, True], [True, True, False]])}
    plain = function(model, x, masks)
    for example in ((x,), {"x": x}, {"x": x, "scale": torch.zeros(1), "odd": None}):
        assert function(model, example, masks) == plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@BOTH
def test_models_of_other_precision(function, dtype):
    model = TwiceNet()
    masks, x = half(model), torch.randn(1, 4, 8, 8)
    plain = function(model, x, masks)
    assert function(model.to(dtype), x.to(dtype), masks) == plain


@BOTH
@pytest.mark.parametrize(
    "example, got", [(3, "int"), ({"a": 1}, "dict of .a: int."), ((), "tuple of ..")]
)
def test_an_example_without_a_tensor(function, example, got):
    match = f"^{function.__name__}: example must be a tensor, or a tuple or dictionary "
    with pytest.raises(FieldError, match=f"{match}that holds one, got {got}$"):
        function(nn.Linear(2, 2), example, {"weight": torch.ones(2, 2) > 0})


@BOTH
def test_masks_that_do_not_fit(function):
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.raises(FisherpruneError, match="Linear has no parameter 'w'"):
        function(layer, x, {"w": torch.ones(2, 2) > 0})
    with pytest.raises(FisherpruneError, match=r"has shape \[2, 2\], its mask \[2\]"):
        function(layer, x, {"weight": torch.ones(2) > 0})
    with pytest.raises(FisherpruneError, match=f"^{function.__name__}: mask of 'weig"):
        function(layer, x, {"weight": torch.ones(2, 2)})
    with pytest.raises(FieldError, match="model must be a torch.nn.Module, got str"):
        function("resnet18", x, {"weight": torch.ones(2, 2) > 0})


def test_an_example_that_the_model_does_not_take():
    layer, match = nn.Linear(2, 2), "the model must run on the example, got RuntimeErr"
    with pytest.raises(FisherpruneError, match=f"^flops: {match}"):
        fp.flops(layer, torch.ones(1, 3))
    with pytest.raises(FisherpruneError, match="^flops: the model .* got TypeError: "):
        fp.flops(layer, {"y": torch.ones(1, 2)})


def _refused(forward, match, x=None):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.run = nn.Linear(4, 4), forward

        def forward(self, x):
            return self.run(self.fc(x))

    with pytest.raises(FisherpruneError, match=f"^effective_masks: {match}"):
        masks = {"fc.weight": torch.ones(4, 4) > 0}
        fp.effective_masks(Odd(), torch.ones(1, 4) if x is None else x, masks)


@pytest.mark.parametrize(
    "forward, match",
    [
        (lambda x: x.topk(2).values, "paths can't be followed through topk, which cho"),
        (lambda x: torch.sort(x)[0], "paths can't be followed through sort, which cho"),
        (
            lambda x: nn.functional.max_pool1d(x[None], 2, dilation=2),
            "dilation of max_pool1d must be 1 for paths to be followed through it, got",
        ),
        (lambda x: x / 0, "the paths through 'fc.weight' can't be told: its gradient"),
        (
            lambda x: x.argmax(1),
            "the model must return floating-point tensors, alone or in tuples, lists "
            r"or dictionaries, got Tensor \[1\]",
        ),
        (
            lambda x: x @ torch.ones(4, 4),
            "the model must run on the example in float64, got RuntimeError: 'expected",
        ),
    ],
)
def test_paths_that_can_not_be_told(forward, match):
    _refused(forward, match)


def test_positions_may_be_sorted_and_bounded():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, x):
            return self.table(torch.sort(x.clamp(0, 4).relu())[0])

    masks = {"table.weight": torch.rand(5, 3) < 0.5}
    tokens = torch.tensor([[9, -3, 2]])
    assert fp.effective_masks(Positions(), tokens, masks) == masks


def test_outputs_that_depend_on_no_masked_weight():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    masks = {"unused.weight": torch.ones(2, 2) > 0}
    x = torch.ones(1, 2)
    assert fp.effective_masks(Unused(), x, masks).kept() == 0
    found = fp.flops(Unused(), x, masks)
    assert found.uncounted == ("unused.weight",) and found.masked == found.dense == 8
