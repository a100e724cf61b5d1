"""Pruning of prepared models in a loop under Accelerate."""

import doctest

import pytest
import torch
from mask_cases import assert_zero_where_pruned
from nets import conv_net
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fisherprune as fp

accelerate = pytest.importorskip("accelerate")

from fisherprune.integrations import accelerate as door  # noqa: E402
from fisherprune.integrations.accelerate import Pruning  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed):
    torch.manual_seed(seed)
    return conv_net()


def images(samples=10):
    return [(torch.randn(3, 9, 9), i % 5) for i in range(samples)]


def loop(data, seed=0, shuffle=False, **options):
    """Return an accelerator, and what it has prepared: the loop begins."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = seeded(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=0.1)
    loader = DataLoader(data, 4, shuffle=shuffle)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def epoch(accelerator, model, optimizer, loader):
    """Train, and return the labels that came."""
    labels = []
    for x, y in loader:
        labels += y.tolist()
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return labels


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_examples():
    result = doctest.testmod(door)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    "how, options",
    [
        (("fts", 0.8), {}),
        (("snip", 0.5, "layer"), {"structure": "channels", "rounds": 3}),
    ],
)
def test_masks_are_those_of_find_masks(how, options):
    data = images()
    accelerator, model, optimizer, loader = loop(data, gradient_accumulation_steps=2)
    code, sparsity, *scope = how
    batches = list(DataLoader(data, 4))
    pruning = Pruning(accelerator, model, optimizer)
    epoch(accelerator, model, optimizer, loader)
    (masks,) = fp.find_masks(model, batches, code, [sparsity], *scope, **options)
    assert pruning.prune(loader, *how, **options) is pruning.masks
    assert pruning.masks == masks
    for _ in range(2):
        before = model[9].weight.detach().clone()
        epoch(accelerator, model, optimizer, loader)
        assert_zero_where_pruned(model, masks)
        assert not torch.equal(model[9].weight, before)
    pruning.remove()
    epoch(accelerator, model, optimizer, loader)
    assert same(pruning.masks, masks)


def test_a_state_that_is_loaded_is_held_with_its_masks(tmp_path):
    """Also one of before the pruning, whose weights are not set to zero."""
    data = images()
    accelerator, model, optimizer, loader = loop(data)
    pruning = Pruning(accelerator, model, optimizer)
    epoch(accelerator, model, optimizer, loader)
    accelerator.save_state(tmp_path / "dense")
    dense = {n: t.clone() for n, t in model.state_dict().items()}
    masks = pruning.prune(loader, "fts", 0.8)
    epoch(accelerator, model, optimizer, loader)
    accelerator.save_state(tmp_path / "pruned")
    epoch(accelerator, model, optimizer, loader)
    wanted = {n: t.clone() for n, t in model.state_dict().items()}

    other = loop(data, 1)
    again = Pruning(*other[:3])
    other[0].load_state(tmp_path / "pruned")
    assert again.masks == masks
    epoch(*other)
    assert_zero_where_pruned(other[1], masks)
    assert same(other[1].state_dict(), wanted)

    accelerator.load_state(tmp_path / "dense")
    assert pruning.masks is None
    assert same(model.state_dict(), dense)
    epoch(accelerator, model, optimizer, loader)
    assert all(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_the_loader_goes_on_as_if_it_had_not_been_read():
    data = images(30)
    orders = []
    for reads in (0, 1):
        config = accelerate.DataLoaderConfiguration(use_seedable_sampler=True)
        parts = loop(data, shuffle=True, dataloader_config=config)
        torch.manual_seed(7)
        first = epoch(*parts)
        for _ in range(reads):
            Pruning(*parts[:3]).prune(parts[3], "snip", 0.5, rounds=2)
        orders.append([first, epoch(*parts), epoch(*parts)])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


def test_a_second_pruning_ends_the_hold_of_the_first():
    accelerator, model, optimizer, loader = loop(images())
    pruning = Pruning(accelerator, model, optimizer)
    for seed in (0, 1):
        masks = pruning.prune([], "random", 0.5, seed=seed)
        epoch(accelerator, model, optimizer, loader)
        assert_zero_where_pruned(model, masks)
    trained = [model.get_parameter(name)[mask] != 0 for name, mask in masks.items()]
    assert torch.cat(trained).float().mean() > 0.9


def test_several_optimizers():
    accelerator, model, _, loader = loop(images())
    parts = model[:4].parameters(), model[4:].parameters()
    kinds = torch.optim.SGD(parts[0], 0.05, 0.9), torch.optim.AdamW(parts[1], 0.01)
    optimizers = list(accelerator.prepare(*kinds))
    pruning = Pruning(accelerator, model, optimizers)
    masks = pruning.prune(loader, "fts", 0.8)
    for _ in range(2):
        for optimizer in optimizers:
            epoch(accelerator, model, optimizer, loader)
    assert_zero_where_pruned(model, masks)


def test_mistakes_leave_the_model_as_it_was():
    data = images()
    accelerator, model, optimizer, loader = loop(data)
    pruning = Pruning(accelerator, model, optimizer)
    with pytest.raises(
        fp.FisherpruneError, match="accelerator must be an accelerate.A"
    ):
        Pruning(model, accelerator, optimizer)
    for options, text in (
        ({"criterion": "ftz"}, "unknown criterion"),
        ({"batches": [(torch.randn(2, 5, 9, 9), torch.arange(2))]}, "the model failed"),
    ):
        with pytest.raises(fp.FisherpruneError, match=text):
            pruning.prune(**{"batches": loader} | options)
    other = torch.optim.SGD(conv_net().parameters(), 0.1)
    with pytest.raises(
        fp.FisherpruneError, match="the model's own .* sharded, got SGD"
    ):
        Pruning(accelerator, model, other).prune([])  # before it reads any
    assert pruning.masks is None
    assert same(model.state_dict(), seeded(0).state_dict())
    model.load_state_dict(seeded(1).state_dict())
    assert same(model.state_dict(), seeded(1).state_dict())
