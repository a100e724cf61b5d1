"""Masks that change while they are held: what becomes zero, and what stays."""

import copy
import io

import pytest
import torch
from mask_cases import assert_zero_where_pruned, half_masks
from nets import conv_net
from torch import nn

import fisherprune as fp
from fisherprune.masks.masks import Masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 9, 9, generator=generator)
    return x, torch.randint(5, (8,), generator=generator)


def steps(model, optimizer, numbers):
    for number in numbers:
        x, y = data(number)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def state_of(optimizer, parameter):
    """Return the tensors that an optimizer keeps for each entry of a parameter."""
    values = optimizer.state[parameter].values()
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    return [v.clone() for v in tensors if v.shape == parameter.shape]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_changes_and_what_stays(kind):
    model = conv_net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    old, new = half_masks(model), half_masks(model)
    hold = old.hold(model, optimizer)
    steps(model, optimizer, range(3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    states = {n: state_of(optimizer, p) for n, p in model.named_parameters()}
    hold.update(new)
    assert hold.masks == new
    for name, parameter in model.named_parameters():
        ones = torch.ones_like(parameter, dtype=torch.bool)
        both = old.get(name, ones) & new.get(name, ones)
        assert torch.equal(parameter, before[name].where(both, 0))
        for state, was in zip(
            state_of(optimizer, parameter), states[name], strict=True
        ):
            assert torch.equal(state, was.where(both, 0))
        assert not parameter.grad[~new.get(name, ones)].any()
    steps(model, optimizer, range(3, 6))
    assert_zero_where_pruned(model, new)
    back = new["3.weight"] & ~old["3.weight"]
    assert model[3].weight[back].any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_equals_a_hold_made_anew(kind):
    """Where nothing comes back, the two ways set the same zeros."""
    model = conv_net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    old = half_masks(model)
    new = old & half_masks(model)
    hold = old.hold(model, optimizer)
    steps(model, optimizer, range(2))
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    hold.update(new)
    with new.hold(twin, its_optimizer):
        for net, one in ((model, optimizer), (twin, its_optimizer)):
            steps(net, one, range(2, 5))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_momentum_by_hand():
    """SGD with masks that change, written out for one layer."""
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(5, 6)
    weight, speed = layer.weight.detach().clone(), torch.zeros(4, 6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    last = torch.ones(4, 6, dtype=torch.bool)
    hold = Masks({"weight": last}).hold(layer, optimizer)
    for _ in range(4):
        mask = torch.rand(4, 6) < 0.6
        hold.update({"weight": mask})
        weight, speed = weight * (mask & last), speed * (mask & last)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
            speed = 0.9 * speed + mask * (2 * (x @ weight.T).T @ x)
            weight = weight - 0.1 * speed
        torch.testing.assert_close(layer.weight.detach(), weight)
        last = mask


def test_weights_that_come_back_begin_where_the_caller_says():
    model = conv_net()
    old = half_masks(model)
    hold = old.hold(model)
    model[3].weight.data.fill_(2.0)  # by hand: undone by the update
    hold.update(~old)
    assert not model[3].weight.any()
    with torch.no_grad():
        model[3].weight[~old["3.weight"]] = 0.5
    model(data(0)[0])
    assert torch.equal(model[3].weight, 0.5 * ~old["3.weight"])


def test_a_step_behind_the_update_moves_nothing_that_is_pruned():
    """Its gradients are those of before the update."""
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    hold = half_masks(model).hold(model, optimizer)
    x, y = data(0)
    nn.functional.cross_entropy(model(x), y).backward()
    new = half_masks(model)
    hold.update(new)
    optimizer.step()
    assert_zero_where_pruned(model, new)
    for name, mask in new.items():
        (momentum,) = state_of(optimizer, model.get_parameter(name))
        assert not momentum[~mask].any()


def test_masks_that_do_not_fit_change_nothing():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = half_masks(model)
    hold = masks.hold(model, optimizer)
    steps(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    none = {n: torch.zeros_like(m) for n, m in masks.items()}
    missing = {n: m for n, m in none.items() if n != "9.weight"}
    for wrong, match in [
        (missing, "masks must be of the 5 held parameters, got '9.weight' in one"),
        (none | {"x": none["9.weight"]}, "must be of the 5 held parameters, got 'x'"),
        (
            none | {"9.weight": none["0.weight"]},
            r"update: mask of '9.weight' must be of shape \[11, 175\], got .6, 3",
        ),
        (none | {"9.weight": 1.0 * none["9.weight"]}, "must be a bool tensor"),
        (None, "must map parameter names to bool tensors, got None"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=match):
            hold.update(wrong)
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for key, state in before[1].items():
        assert torch.equal(state["momentum_buffer"], after[1][key]["momentum_buffer"])
    assert hold.masks == masks
    hold.remove()
    with pytest.raises(fp.FisherpruneError, match="the hold must not have ended"):
        hold.update(masks)


def test_held_masks_are_copies():
    model = conv_net()
    masks = half_masks(model)
    hold = masks.hold(model)
    new = half_masks(model)
    given = {name: mask.clone() for name, mask in new.items()}
    hold.update(given)
    for mask in (*given.values(), *hold.masks.values()):
        mask.fill_(True)
    assert hold.masks == new
    model(data(0)[0])
    assert_zero_where_pruned(model, new)


def test_a_hold_ends_after_many_updates():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with half_masks(model).hold(model, optimizer) as hold:
        for _ in range(5):
            hold.update(half_masks(model))
    last = hold.masks
    model.load_state_dict(conv_net().state_dict())
    steps(model, optimizer, range(1))
    for name, mask in last.items():
        weight = model.get_parameter(name)
        assert weight[~mask].any() and weight.grad[~mask].any()


def test_parameters_that_were_assigned_have_the_new_masks():
    model = conv_net()
    hold = half_masks(model).hold(model)
    model.load_state_dict(conv_net().state_dict(), assign=True)
    new = half_masks(model)
    hold.update(new)
    assert_zero_where_pruned(model, new)
    model.load_state_dict(conv_net().state_dict())
    assert_zero_where_pruned(model, new)
    assert model[3].weight[new["3.weight"]].any()


def test_wrapped_and_compiled_models():
    model = conv_net()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["adam"](compiled.parameters())
    hold = half_masks(model).hold(compiled, optimizer)
    for round in range(2):
        steps(compiled, optimizer, range(2 * round, 2 * round + 2))
        new = half_masks(model)
        hold.update({f"_orig_mod.{name}": mask for name, mask in new.items()})
        assert_zero_where_pruned(model, new)
        steps(compiled, optimizer, range(2))
        assert_zero_where_pruned(model, new)


def test_a_layer_that_collapses_is_named():
    model = conv_net()
    masks = half_masks(model)
    hold = masks.hold(model)
    gone = Masks({n: m & (n != "3.weight") for n, m in masks.items()})
    with pytest.warns(fp.LayerCollapseWarning, match="'3.weight'") as caught:
        hold.update(gone)
    assert caught[0].filename == __file__


def gradual(model, optimizer, hold, rounds):
    """Prune a little more every two steps, by magnitude among what is left."""
    for round in rounds:
        scores = fp.score(model, [], "magnitude")
        sparsity = 0.1 + 0.15 * round
        hold.update(fp.select_masks(scores, sparsity, among=hold.masks))
        steps(model, optimizer, range(2 * round, 2 * round + 2))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_schedule_that_is_resumed_ends_bit_for_bit_the_same(kind, tmp_path):
    start = conv_net().state_dict()

    def fresh():
        model = conv_net()
        model.load_state_dict(start)
        return model, OPTIMIZERS[kind](model.parameters())

    model, optimizer = fresh()
    full = Masks({n: p == p for n, p in fp.prunable_parameters(model).items()})
    hold = full.hold(model, optimizer)
    gradual(model, optimizer, hold, range(2))
    hold.masks.save(tmp_path / "masks.safetensors")
    torch.save((model.state_dict(), optimizer.state_dict()), file := io.BytesIO())
    gradual(model, optimizer, hold, range(2, 5))

    other, its_optimizer = fresh()
    file.seek(0)
    for one, state in zip((other, its_optimizer), torch.load(file), strict=True):
        one.load_state_dict(state)
    its_hold = Masks.load(tmp_path / "masks.safetensors").hold(other, its_optimizer)
    gradual(other, its_optimizer, its_hold, range(2, 5))

    assert hold.masks == its_hold.masks and hold.masks.sparsity() > 0.69
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        pairs = zip(state_of(optimizer, a), state_of(its_optimizer, b), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
