"""Holds rest on the parameters: zeros whatever writes the weights, and with what."""

import copy
import gc
import weakref

import pytest
import torch
from mask_cases import assert_zero_where_pruned, half_masks
from nets import conv_net
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fisherprune as fp
from fisherprune.masks.masks import Masks

DATA = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))


def momentum_sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def loss_of(model):
    return nn.functional.cross_entropy(model(DATA[0]), DATA[1])


def steps(model, optimizer, count=1):
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def shift(model):
    """Write all weights by hand, so that no version counter tells."""
    for parameter in model.parameters():
        parameter.data.add_(1.0)


class Delegating(torch.optim.Optimizer):
    """Wraps an optimizer as Accelerate does: the base's constructor is not called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class SharpnessAware(torch.optim.Optimizer):
    """Steps to a neighbour, takes the gradient there, steps from the first place."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base = [optimizer]  # in a list, to hide it

    @torch.no_grad()
    def step(self, closure):
        closure()
        parameters = [p for g in self.param_groups for p in g["params"]]
        for p in parameters:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        closure()
        for p in parameters:
            p.copy_(self.state[p]["before"])
        self.base[0].step()


class Lookahead(torch.optim.Optimizer):
    """Pulls the weights half way back to slow ones, which it keeps by parameter."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer
        self.slow = {
            p: p.detach().clone() for g in self.param_groups for p in g["params"]
        }

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for p, slow in self.slow.items():
            p.data.copy_(slow.lerp_(p, 0.5))


def train(model, optimizer, count):
    def closure():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_of(model).backward()

    for _ in range(count):
        if isinstance(optimizer, SharpnessAware):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("wrapper", [Delegating, SharpnessAware, Lookahead])
@pytest.mark.parametrize("given", ["wrapper", "base", "none"])
def test_wrapped_optimizers_after_a_dense_warm_up(wrapper, given):
    model = conv_net()
    base = momentum_sgd(model.parameters())
    optimizer = wrapper(base)
    train(model, optimizer, 3)
    masks = half_masks(model)
    hold = masks.hold(model, *{"wrapper": [optimizer], "base": [base]}.get(given, []))
    for _ in range(3):
        train(model, optimizer, 1)
        assert_zero_where_pruned(model, masks)
    hold.remove()
    for name, mask in masks.items():
        momentum = base.state[model.get_parameter(name)]["momentum_buffer"]
        assert given == "none" or not momentum[~mask].any()


def test_what_a_wrapper_keeps_by_parameter_is_cleaned():
    model = conv_net()
    optimizer = Lookahead(momentum_sgd(model.parameters()))
    masks = half_masks(model)
    masks.hold(model, optimizer)
    for name, mask in masks.items():
        assert not optimizer.slow[model.get_parameter(name)][~mask].any()


def test_weights_written_by_hand_are_zero_at_the_next_forward():
    model = conv_net()
    masks = half_masks(model)
    with masks.hold(model):
        shift(model)
        with torch.no_grad():
            model(DATA[0])
        assert_zero_where_pruned(model, masks)
        weights = parameters_to_vector(model.parameters()).detach()
        vector_to_parameters(torch.randn_like(weights), model.parameters())
        with torch.inference_mode():
            model(DATA[0])
        assert_zero_where_pruned(model, masks)
    shift(model)
    model(DATA[0])
    assert model[0].weight[~masks["0.weight"]].any()


@pytest.mark.parametrize("part", ["", "3"], ids=["whole", "module"])
def test_weights_written_by_hand_are_zero_in_the_state_dict(part):
    model = conv_net()
    masks = half_masks(model)
    with masks.hold(model):
        shift(model)
        saved = model.get_submodule(part).state_dict(prefix=f"{part}." if part else "")
        assert not saved["3.weight"][~masks["3.weight"]].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -0.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
)
def test_what_is_not_finite_becomes_zero(bad, dtype):
    model = nn.Linear(5, 4, dtype=dtype)
    mask = torch.rand(4, 5) < 0.5
    with Masks({"weight": mask}).hold(model):
        model.weight.data.fill_(bad)
        model.state_dict()
        pruned = model.weight[~mask]
        assert not pruned.any() and not torch.signbit(pruned.real).any()
        kept = model.weight[mask]
        assert torch.equal(kept, torch.full_like(kept, bad)) or bad != bad


def test_complex_weights_of_sixteen_bytes():
    model, mask = nn.Linear(5, 4, dtype=torch.complex128), torch.rand(4, 5) < 0.5
    with Masks({"weight": mask}).hold(model):
        model.weight.data.add_(1)
        model.state_dict()
        assert not model.weight[~mask].any() and model.weight[mask].all()


def test_two_forwards_before_a_backward():
    model = conv_net()
    half_masks(model).hold(model)
    (loss_of(model) + loss_of(model)).backward()


def test_gradients_used_up_inside_of_the_backward_pass():
    model = conv_net()
    for parameter in model.parameters():
        optimizer = momentum_sgd([parameter])

        def step(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    loss_of(model).backward()
    masks = half_masks(model)
    with masks.hold(model):
        for _ in range(2):
            loss_of(model).backward()
            assert_zero_where_pruned(model, masks)


@pytest.mark.parametrize(
    "kind", [{"foreach": True}, {"fused": True}, {"foreach": False}]
)
def test_training_under_a_hold_repeats_bit_for_bit(kind):
    """The zeros are set as masked_fill_ sets them, and nothing else changes."""
    model = conv_net()
    twin, masks = copy.deepcopy(model), half_masks(model)
    optimizers = [
        torch.optim.AdamW(m.parameters(), 0.01, **kind) for m in (model, twin)
    ]
    masks.hold(model, optimizers[0])
    masks.apply_(twin)
    for _ in range(3):
        steps(model, optimizers[0])
        optimizers[1].zero_grad()
        loss_of(twin).backward()
        for name, mask in masks.items():
            twin.get_parameter(name).grad.masked_fill_(~mask, 0.0)
        optimizers[1].step()
        masks.apply_(twin)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)


class Count(TorchDispatchMode):
    """Counts calls of ops by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_zeros_take_two_calls_a_step_and_one_a_forward():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=True)
    half_masks(model).hold(model, optimizer)
    steps(model, optimizer)
    loss_of(model).backward()
    with Count() as count:
        optimizer.step()
    assert count.calls["_foreach_mul_"] == 2  # before its later hooks and behind them
    assert "masked_fill_" not in count.calls
    with Count() as count:
        model(DATA[0])
    assert count.calls["_foreach_mul_"] == 1


def test_no_hook_is_left():
    model = conv_net()
    before = len(_global_optimizer_post_hooks)
    optimizer = SharpnessAware(momentum_sgd(model.parameters()))
    hold, again = (half_masks(model).hold(model, optimizer) for _ in range(2))
    assert len(_global_optimizer_post_hooks) == before + 2
    hold.remove()
    hold.remove()
    again.remove()
    assert len(_global_optimizer_post_hooks) == before
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks
    for one in (optimizer, optimizer.base[0]):
        assert not one._optimizer_step_post_hooks


def test_a_hold_ends_with_its_model():
    before = len(_global_optimizer_post_hooks)
    model = conv_net()
    half_masks(model).hold(model, momentum_sgd(model.parameters()))
    weight = weakref.ref(model[0].weight)
    assert len(_global_optimizer_post_hooks) == before + 1
    del model
    gc.collect()
    assert weight() is None and len(_global_optimizer_post_hooks) == before


def test_a_hold_lasts_as_long_as_its_model():
    model = conv_net()
    optimizer = momentum_sgd(model.parameters())
    masks = half_masks(model)
    masks.hold(model, optimizer)
    gc.collect()
    steps(model, optimizer)
    assert_zero_where_pruned(model, masks)


def test_a_foreign_optimizer_moves_nothing_of_the_model():
    model, other = conv_net(), conv_net()
    masks = half_masks(model)
    with masks.hold(model):
        shift(model)
        steps(other, momentum_sgd(other.parameters()))
        assert model[0].weight[~masks["0.weight"]].any()
    assert other[0].weight[~masks["0.weight"]].any()


def test_hooks_of_the_optimizer_find_zeros_and_leave_them():
    model = conv_net()
    optimizer = momentum_sgd(model.parameters())
    masks = half_masks(model)
    steps(model, optimizer)
    masks.hold(model)
    masks.hold(model, optimizer)
    seen = []
    optimizer.register_step_post_hook(
        lambda *_: seen.append(model[3].weight[~masks["3.weight"]].any().item())
    )
    optimizer.register_step_post_hook(lambda *_: shift(model))
    optimizer.state[model[3].weight]["momentum_buffer"].fill_(1.0)
    steps(model, optimizer)
    assert seen == [False]
    assert_zero_where_pruned(model, masks)


def test_a_model_that_is_moved_or_changes_its_type_is_held():
    model = conv_net()
    masks = half_masks(model)
    with masks.hold(model):
        model.double().to(memory_format=torch.channels_last)
        shift(model)
        model(DATA[0].double()).sum().backward()
        assert_zero_where_pruned(model, masks)
        for name, mask in masks.items():
            assert not model.get_parameter(name).grad[~mask].any()


def test_loaded_parameters_are_held_and_trained():
    model = conv_net()
    masks = half_masks(model)
    with masks.hold(model):
        model.load_state_dict(conv_net().state_dict(), assign=True)
        optimizer = momentum_sgd(model.parameters())
        steps(model, optimizer, 2)
        assert_zero_where_pruned(model, masks)
        for name, mask in masks.items():
            assert not model.get_parameter(name).grad[~mask].any()
        shift(model)
        model(DATA[0])
        assert_zero_where_pruned(model, masks)
    assert not model[0].weight._post_accumulate_grad_hooks


def test_function_transforms_and_tracing():
    model = conv_net().eval()
    half_masks(model).hold(model)
    weights = {n: p.detach() + 1 for n, p in model.named_parameters()}
    wanted = {n: p.clone() for n, p in weights.items()}

    def loss(weights, x, y):
        output = torch.func.functional_call(model, weights, (x[None],))
        return nn.functional.cross_entropy(output, y[None])

    torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, *DATA)
    assert all(torch.equal(weights[n], wanted[n]) for n in weights)
    program = torch.export.export(model, (DATA[0],))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("foreach" in name for name in names)


def test_scores_are_those_without_a_hold():
    model = conv_net()
    masks = half_masks(model)
    with masks.hold(model, momentum_sgd(model.parameters())):
        held = fp.score(model, [DATA], "fts")
    free = fp.score(model, [DATA], "fts")
    assert all(torch.equal(held[name], free[name]) for name in free)
