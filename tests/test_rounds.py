"""Pruning in rounds against a float64 loop that follows the papers."""

import pytest
import torch
import truth
from nets import batches, conv_net, narrow_vgg11
from torch import nn

import fisherprune as fp
from fisherprune import models
from fisherprune.masks.counts import keep_count

SCHEDULES = {
    "exponential": lambda share, part: share**part,
    "linear": lambda share, part: 1 - (1 - share) * part,
}


def find_masks(model, batches, code, sparsity, *options, **more):
    """Return the masks of one sparsity, or of several."""
    if isinstance(sparsity, list):
        return fp.find_masks(model, batches, code, sparsity, *options, **more)
    (masks,) = fp.find_masks(model, batches, code, [sparsity], *options, **more)
    return masks


def data(samples=13, size=9, classes=5):
    return torch.randn(samples, 3, size, size), torch.randint(classes, (samples,))


def statistic(code, model, x, y, names):
    """Return {name: {letter: tensor}} of a model as it is."""
    if code == "synflow":
        found = truth.synaptic_flow(model, x.shape[1:], names)
        return {name: {"R": slope} for name, slope in found.items()}
    if code in ("snip", "force"):
        found = truth.moments(model, x, y, names, group_size=len(x))
        return {name: {"m": m} for name, (m, _) in found.items()}
    return {name: {} for name in names}


def masks_of_rounds(code, model, x, y, sparsity, rounds, schedule):
    """Return the masks in float64."""
    weights = {n: p.detach().clone() for n, p in fp.prunable_parameters(model).items()}
    total = sum(w.numel() for w in weights.values())
    share, masks = keep_count(total, sparsity) / total, None
    for t in range(1, rounds + 1):
        keep = keep_count(total, 1 - SCHEDULES[schedule](share, t / rounds))
        masks = next_masks(code, model, x, y, weights, masks, keep)
        for name, weight in weights.items():
            model.get_parameter(name).data.copy_(weight * masks[name])
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
    return masks


def next_masks(code, model, x, y, weights, masks, keep):
    found = statistic(code, model, x, y, weights)
    scores = {
        name: truth.score(code, weight.double(), **found[name])
        for name, weight in weights.items()
    }
    if masks is not None and code != "force":  # what was removed stays removed
        scores = {n: s.where(masks[n], -torch.inf) for n, s in scores.items()}
    return truth.keep_largest(scores, keep)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("code", ["snip", "force", "synflow", "magnitude"])
@pytest.mark.parametrize("rounds", [2, 7])
def test_small_networks(code, schedule, rounds):
    model, (x, y) = conv_net(), data()
    options = {"rounds": rounds, "schedule": schedule, "ties": "position"}
    found = find_masks(model, batches(x, y, 5), code, 0.9, **options)
    wanted = masks_of_rounds(code, model, x, y, 0.9, rounds, schedule)
    assert found.kept() == keep_count(found.total(), 0.9)
    assert sum(int((found[n] != wanted[n]).sum()) for n in wanted) <= 2


@pytest.mark.parametrize("code", ["snip", "force", "synflow"])
@pytest.mark.parametrize("make", [models.resnet20, narrow_vgg11])
def test_every_round_of_the_papers_networks(code, make):
    """Each from the masks before it: a ReLU that rounds to its other side adds up."""
    model, (x, y) = make(), data(8, 16, 10)
    weights = {n: p.detach().clone() for n, p in fp.prunable_parameters(model).items()}
    total = sum(w.numel() for w in weights.values())
    share = keep_count(total, 0.98) / total
    sparsities = [1 - share ** (t / 3) for t in (1, 2)] + [0.98]
    options = {"rounds": 3, "ties": "position"}
    found = find_masks(model, [(x, y)], code, sparsities, **options)
    for before, masks in zip([None, *found], found, strict=False):
        for name, weight in weights.items():
            kept = 1 if before is None else before[name]
            model.get_parameter(name).data.copy_(weight * kept)
        wanted = next_masks(code, model, x, y, weights, before, masks.kept())
        other = sum(int((masks[n] != wanted[n]).sum()) for n in wanted)
        assert other <= total * (1e-4 if code == "synflow" else 1e-3)


def test_two_weights_that_come_back_or_not():
    """``y = a b x`` with loss ``-y``: each one's gradient holds the other weight.

    Scores are equal until one is removed; then the gradient of what is left is zero,
    that of what was removed is not, and FORCE takes it back.
    """

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([2.0, 1.0, 0.5]))

        def forward(self, x):
            a, b, c = self.weight
            return (a * b + c) * x

    model, batch = Product(), (torch.ones(2, 1), torch.zeros(2, 1))
    options = {
        "loss_fn": lambda outputs, _: -outputs.mean(),
        "parameters": {"weight": model.weight},
        "rounds": 3,
        "ties": "position",
    }
    # Round 1: scores 2, 2, 0.5; keeps 2 (a, b). Round 2: 2, 2, 0.5; keeps 1 (a).
    # Round 3: b is 0, so a scores 0, b 2 and c 0.5.
    once = find_masks(model, [batch], "snip", 2 / 3, **options)
    again = find_masks(model, [batch], "force", 2 / 3, **options)
    assert once["weight"].tolist() == [True, False, False]
    assert again["weight"].tolist() == [False, True, False]
    assert model.weight.tolist() == [2.0, 1.0, 0.5]


@pytest.mark.parametrize("code", ["snip", "force", "synflow", "random"])
def test_one_round_is_ordinary_pruning(code):
    model, batch = conv_net(), data()
    options = {"seed": 3, "ties": "position"}
    found = find_masks(model, [batch], code, 0.8, rounds=1, **options)
    scores = fp.score(model, [batch], code, seed=3)
    assert found == fp.select_masks(scores, 0.8, ties="position")


@pytest.mark.parametrize("code", ["snip", "force", "synflow"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_several_sparsities_come_from_one_run(code, scope):
    model, batch = conv_net(), data()
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    options = {"rounds": 6, "ties": "position"}
    sparsities = [0.95, 0.0, 0.5, 0.95, 0.7]
    found = find_masks(model, [batch], code, sparsities, scope, **options)
    drawn = fp.score(model, [], "random")
    once = fp.select_masks(drawn, sparsities, scope)
    assert [m.kept() for m in found] == [m.kept() for m in once]
    alone = find_masks(model, [batch], code, 0.95, scope, **options)
    assert found[0] == found[3] == alone
    if code != "force":  # what is removed at a lower sparsity stays removed
        assert all((found[2] & tight) == tight for tight in (found[0], found[4]))
    after = model.state_dict()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())


def test_prune_takes_the_masks_of_its_rounds():
    model, batch = conv_net(), data()
    options = {"rounds": 5, "schedule": "linear", "ties": "position"}
    found = find_masks(model, [batch], "force", 0.9, **options)
    masks = fp.prune(model, [batch], "force", 0.9, **options)
    assert masks == found
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_each_round_draws_other_numbers():
    model = conv_net()
    few, many = (find_masks(model, [], "random", 0.9, rounds=n, seed=1) for n in (1, 2))
    assert few != many
    assert many == find_masks(model, [], "random", 0.9, rounds=2, seed=1)


def test_batches_that_can_be_read_once_serve_every_round():
    model, (x, y) = conv_net(), data()
    options = {"rounds": 4, "ties": "position"}
    found = find_masks(model, iter(batches(x, y, 5)), "snip", 0.9, **options)
    assert found == find_masks(model, batches(x, y, 5), "snip", 0.9, **options)


def test_a_model_is_left_as_found_after_an_error():
    class Ends(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            if self.reads == 4:
                raise RuntimeError("the disk is gone")
            return super().__iter__()

    model, batch = conv_net(), data()
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="the disk is gone"):
        fp.prune(model, Ends([batch]), "snip", 0.9, rounds=5, ties="position")
    after = model.state_dict()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())


@pytest.mark.parametrize("rounds", [0, -1, 2.0, True, "3"])
def test_numbers_of_rounds_that_are_refused(rounds):
    with pytest.raises(fp.FisherpruneError, match="rounds must be a whole number of"):
        fp.prune(conv_net(), [data()], "snip", rounds=rounds)


@pytest.mark.parametrize("schedule", ["cubic", None, 3])
def test_schedules_that_are_refused(schedule):
    with pytest.raises(fp.FisherpruneError, match="schedule must be one of .'exp"):
        fp.prune(conv_net(), [data()], "snip", schedule=schedule)


def test_mistakes_are_found_before_the_first_pass():
    for wrong in ({"sparsities": [0.5, 1.5]}, {"scope": "galactic"}):
        with pytest.raises(fp.FisherpruneError, match="sparsity must|scope must"):
            fp.find_masks(conv_net(), None, **wrong)
    for wrong in (0.5, "0.5", None):
        with pytest.raises(fp.FisherpruneError, match="sparsities must be a list of"):
            fp.find_masks(conv_net(), None, sparsities=wrong)


@pytest.mark.parametrize("code", ["snip", "force", "synflow"])
@pytest.mark.parametrize("rounds", [2, 5, 40])
def test_patterns_and_structures_in_rounds(code, rounds):
    model, batch = conv_net(), data()
    shapes = {n: p.shape for n, p in fp.prunable_parameters(model).items()}
    one, *others = shapes
    patterns = (
        {"structure": "1:4", "sparsity": 0.75},
        {"structure": "channels", "min_per_layer": 1},
        {"structure": "blocks:2x2"},
        {"scope": "erk_plus"},
        {"scope": "uniform_plus", "min_per_layer": 30},
        {"scope": "densities", "densities": {one: 0.0, **dict.fromkeys(others, 1.0)}},
    )
    for pattern in patterns:
        options = {"sparsity": 0.7, "ties": "position"} | pattern
        scores = fp.score(model, [], "random")
        once = fp.select_masks(scores, **options)
        sparsity = options.pop("sparsity")
        found = find_masks(model, [batch], code, sparsity, rounds=rounds, **options)
        if "structure" not in pattern:
            assert found.kept() == once.kept(), pattern
            assert found.density() == once.density(), pattern
        elif pattern["structure"] == "1:4":
            assert found.density() == once.density()
        else:
            assert 0 < found.kept() <= keep_count(found.total(), 0.7), pattern


def test_equal_scores_on_the_way_are_no_ties():
    """Taps that max-pooling leaves out have no flow, more than half of the weights."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 5)),
    )
    batch = (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    scores = fp.score(model, [batch], "synflow")
    assert (scores["3.weight"] == 0).double().mean() > 0.5
    with pytest.raises(fp.FisherpruneError, match="scores must decide"):
        fp.select_masks(scores, 0.3)
    for rounds in (20, 100):
        (masks,) = fp.find_masks(model, [batch], "synflow", [0.99], rounds=rounds)
        assert masks.kept() == keep_count(masks.total(), 0.99)
        assert not masks["3.weight"][scores["3.weight"] == 0].any()
