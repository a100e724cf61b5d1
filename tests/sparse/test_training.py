"""Training a compressed model is training the masked dense one."""

import copy

import pytest
import torch
from sparse_nets import case, loss_of
from torch import nn

import fisherprune as fp
from fisherprune import sparse

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
}


def steps(model, optimizer, batches):
    """Train, a step a batch."""
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def batches_of(name, count):
    """Draw batches for a network."""
    return [case(name, samples=8)[2:] for _ in range(count)]


def assert_same_weights(model, true, masks):
    """Compare a compressed model with a dense one in float64."""
    dense = sparse.decompress(copy.deepcopy(model))
    found, expected = dense.state_dict(), true.state_dict()
    assert [*found] == [*expected]
    for name, value in expected.items():
        if value.is_floating_point():
            error = float((found[name].double() - value.double()).norm())
            assert error <= 1e-4 * float(value.double().norm()) + 1e-6, name
        if name in masks:
            assert not found[name][~masks[name]].any()


@pytest.mark.parametrize("name", ["conv", "sequence", "twice"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fifty_steps(kind, name):
    """In float64, where rounding does not grow: by the dense way of other dtypes."""
    model, masks, *_ = case(name)
    model.double()
    true = copy.deepcopy(model)
    batches = [(x.double(), y) for x, y in batches_of(name, 50)]
    optimizer = OPTIMIZERS[kind](true.parameters())
    masks.hold(true, optimizer)
    steps(true, optimizer, batches)
    sparse.compress(model, masks, dense_above=1.0)
    steps(model, OPTIMIZERS[kind](model.parameters()), batches)
    assert_same_weights(model, true, masks)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fifty_steps_of_the_kernels(kind):
    """A smooth network, in which rounding grows little: float32 beside float64."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    )
    masks = fp.Masks(
        {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.2 for i in (0, 2, 5)}
    )
    true = copy.deepcopy(model).double()
    batches = [(torch.randn(9, 3, 8, 8), torch.randint(5, (9,))) for _ in range(50)]
    optimizer = OPTIMIZERS[kind](true.parameters())
    masks.hold(true, optimizer)
    steps(true, optimizer, [(x.double(), y) for x, y in batches])
    sparse.compress(model, masks, dense_above=1.0)
    steps(model, OPTIMIZERS[kind](model.parameters()), batches)
    assert_same_weights(model, true, masks)


def test_resnet_in_training_mode():
    """With BatchNorm's statistics."""
    model, masks, *_ = case("resnet")
    model.double()
    true = copy.deepcopy(model)
    batches = [(x.double(), y) for x, y in batches_of("resnet", 3)]
    optimizer = OPTIMIZERS["sgd"](true.parameters())
    masks.hold(true, optimizer)
    steps(true, optimizer, batches)
    sparse.compress(model, masks, dense_above=1.0)
    steps(model, OPTIMIZERS["sgd"](model.parameters()), batches)
    assert_same_weights(model, true, masks)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on(kind):
    """Compress within training, and decompress again: momenta go along."""
    model, masks, *_ = case("conv")
    model.double()
    true = copy.deepcopy(model)
    batches = [(x.double(), y) for x, y in batches_of("conv", 9)]
    optimizer = OPTIMIZERS[kind](true.parameters())
    hold = masks.hold(true, optimizer)
    steps(true, optimizer, batches)
    hold.remove()

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    optimizer = OPTIMIZERS[kind](groups)
    lr = optimizer.param_groups[0]["lr"]
    hold = masks.hold(model, optimizer)
    steps(model, optimizer, batches[:3])
    sparse.compress(model, masks, optimizer=optimizer, dense_above=1.0)
    sparse.check_optimizer(model, optimizer)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    assert {id(p) for p in optimizer.state} == own
    assert optimizer.param_groups[0]["lr"] == lr
    steps(model, optimizer, batches[3:6])
    sparse.decompress(model, optimizer=optimizer)
    masks.hold(model, optimizer)
    steps(model, optimizer, batches[6:])
    for (name, p), q in zip(model.named_parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_named_groups_are_renamed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    masks = {"1.weight": torch.eye(4) > 0}
    sparse.compress(model, masks, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model.named_parameters()]


def test_same_bits_for_any_number_of_threads():
    results, before = [], torch.get_num_threads()
    model, masks, *_ = case("twice")
    sparse.compress(model, masks, dense_above=1.0)
    layers = [m for m in model.modules() if isinstance(m, sparse.SparseConv2d)]
    x = torch.randn(9, 4, 8, 8)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = layers[0](layers[0](x).tanh())
            grads = torch.autograd.grad(out.square().sum(), layers[0].values)
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
