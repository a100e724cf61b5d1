"""Holding masks through training: what is zero, when, and what else is touched."""

import copy
import io

import pytest
import torch
from mask_cases import assert_zero_where_pruned, half_masks
from nets import conv_net
from torch import nn

from fisherprune.masks.masks import Masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def steps(model, optimizer, count):
    x, y = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("warm", [0, 3], ids=["fresh", "after_warm_up"])
def test_hold_keeps_exact_zeros(optimizer, warm):
    model = conv_net()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    steps(model, optimizer, warm)
    masks = half_masks(model)
    masks.hold(model, optimizer)
    assert_zero_where_pruned(model, masks)
    kept = model[3].weight.detach().clone()
    for _ in range(3):
        steps(model, optimizer, 1)
        assert_zero_where_pruned(model, masks)
        for name, mask in masks.items():
            assert not model.get_parameter(name).grad[~mask].any()
    assert not torch.equal(model[3].weight, kept)


def test_without_the_hold_momentum_moves_pruned_weights():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer, 2)
    masks = half_masks(model)
    masks.apply_(model)
    steps(model, optimizer, 1)
    assert model[0].weight[~masks["0.weight"]].any()


def masked_twin(model, masks):
    """Return the network whose weights are w * mask, as autograd sees it."""
    twin = copy.deepcopy(model)
    for name, mask in masks.items():
        module = twin.get_submodule(name.rpartition(".")[0])
        masked = nn.Module()
        masked.forward = lambda w, mask=mask: w * mask
        nn.utils.parametrize.register_parametrization(module, "weight", masked)
    return twin


def test_hold_equals_training_the_masked_network():
    """The kept weights move as if w * mask were the network's weight."""
    model = conv_net()
    masks = half_masks(model)
    twin = masked_twin(model, masks)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, twin)]
    masks.hold(model, optimizers[0])
    x, y = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    for i in (0, 3, 5, 7, 9):
        torch.testing.assert_close(model[i].weight, twin[i].weight)


def test_hold_ends():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = half_masks(model)
    with masks.hold(model, optimizer) as hold:
        steps(model, optimizer, 1)
        assert_zero_where_pruned(model, masks)
    steps(model, optimizer, 1)
    assert model[0].weight[~masks["0.weight"]].any()
    hold.remove()


def assert_free(model, optimizer, masks):
    """See that nothing is set to zero any more: what is loaded, gradients, steps."""
    dense = conv_net().state_dict()
    model.load_state_dict(dense)
    assert all(torch.equal(t, dense[n]) for n, t in model.state_dict().items())
    steps(model, optimizer, 1)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight[~mask].any() and weight.grad[~mask].any(), name


def test_a_frozen_weight_is_held_until_and_after_it_is_trained():
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = half_masks(model)
    model[3].weight.requires_grad_(False)
    hold = masks.hold(model, optimizer)
    assert not model[3].weight.requires_grad
    assert_zero_where_pruned(model, masks)
    steps(model, optimizer, 1)
    model[3].weight.requires_grad_(True)
    steps(model, optimizer, 2)
    assert_zero_where_pruned(model, masks)
    assert not model[3].weight.grad[~masks["3.weight"]].any()
    hold.remove()
    assert_free(model, optimizer, masks)


def test_a_frozen_weight_needs_no_optimizer():
    model = conv_net()
    masks = half_masks(model)
    model[3].weight.requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    masks.hold(model, OPTIMIZERS["sgd"](rest))
    assert_zero_where_pruned(model, masks)


@pytest.mark.parametrize("fails", ["parameter", "optimizer"])
def test_a_hold_that_fails_changes_nothing(fails, monkeypatch):
    model = conv_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    def broken(*_):
        raise RuntimeError("no hook")

    if fails == "optimizer":
        monkeypatch.setattr(optimizer, "register_step_post_hook", broken)
    else:
        last = model[9].weight
        monkeypatch.setattr(last, "register_post_accumulate_grad_hook", broken)
    masks = half_masks(model)
    with pytest.raises(RuntimeError, match="no hook"):
        masks.hold(model, optimizer)
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for key, state in before[1].items():
        assert torch.equal(state["momentum_buffer"], after[1][key]["momentum_buffer"])
    assert_free(model, optimizer, masks)


@pytest.mark.parametrize("part", ["", "3"], ids=["whole", "module"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loaded_weights_are_held_at_once(part, assign):
    model = conv_net()
    masks = half_masks(model)
    hold = masks.hold(model, OPTIMIZERS["sgd"](model.parameters()))
    module = model.get_submodule(part)
    dense = conv_net().get_submodule(part).state_dict()
    module.load_state_dict(dense, assign=assign)
    assert_zero_where_pruned(model, masks)
    kept = masks["3.weight"]
    wanted = dense["weight" if part else "3.weight"]
    assert torch.equal(model[3].weight[kept], wanted[kept])
    hold.remove()
    module.load_state_dict(dense)
    assert torch.equal(model[3].weight, wanted)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_is_not_held_and_moves_nothing(way):
    model = conv_net()
    masks = half_masks(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    hold = masks.hold(model, optimizer)
    if way == "deepcopy":
        twin, its_optimizer = copy.deepcopy((model, optimizer))
        steps(twin, its_optimizer, 1)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    hold.remove()
    dense = conv_net().state_dict()
    model.load_state_dict(dense)
    twin.load_state_dict(dense)
    for net in (model, twin):
        assert torch.equal(net[3].weight, dense["3.weight"])


def test_masks_split_for_two_optimizers():
    model = conv_net()
    masks = half_masks(model)
    groups = [
        ["0.weight", "3.weight"],
        [n for n in masks if n not in ("0.weight", "3.weight")],
    ]
    for names in groups:
        optimizer = OPTIMIZERS["sgd"]([model.get_parameter(name) for name in names])
        Masks({name: masks[name] for name in names}).hold(model, optimizer)
        steps(model, optimizer, 1)
    assert_zero_where_pruned(model, masks)


def test_gradient_norm_is_that_of_the_pruned_network():
    model = conv_net()
    masks = half_masks(model)
    twin = masked_twin(model, masks)
    masks.hold(model, OPTIMIZERS["sgd"](model.parameters()))
    x, y = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    norms = []
    for net in (model, twin):
        nn.functional.cross_entropy(net(x), y).backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    torch.testing.assert_close(*norms)


def test_the_history_of_lbfgs_is_forgotten():
    model, x, y = nn.Linear(6, 3), torch.randn(20, 6), torch.randint(3, (20,))
    optimizer, seen = torch.optim.LBFGS(model.parameters(), max_iter=3), []

    def closure():
        optimizer.zero_grad()
        seen.append(model.weight.detach().clone())
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    mask = torch.rand(3, 6) < 0.5
    with Masks({"weight": mask}).hold(model, optimizer):
        seen.clear()
        for _ in range(3):
            optimizer.step(closure)
        assert len(seen) > 3 and not any(w[~mask].any() for w in seen)


def test_sparse_gradients_of_an_embedding():
    model = nn.Embedding(9, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    mask = torch.rand(9, 4) < 0.5
    with Masks({"weight": mask}).hold(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 1, 7])).square().sum().backward()
            assert model.weight.grad.is_sparse
            assert not model.weight.grad.to_dense()[~mask].any()
            optimizer.step()
    assert not model.weight[~mask].any()
