"""The importance of channels against what Torch-Pruning removes, channel by channel."""

import copy
import doctest
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import randomized
from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.integrations.torch_pruning import FisherImportance

tp = pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """A residual block, a depthwise and a grouped convolution, a flattened end."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up, self.grouped = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 12, 3, groups=2)
        self.slope, self.head = nn.PReLU(12), nn.Linear(12 * 4, 5)
        randomized(self)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = self.depthwise(x + torch.relu(self.second(x)))
        x = self.slope(self.grouped(torch.relu(self.up(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """A vision transformer's parts: tokens, positions, attention, an inner layer."""

    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2)
        self.inner, self.outer = nn.Linear(width, 6), nn.Linear(6, width)
        self.head = nn.Linear(width, 5)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm(x).transpose(0, 1)
        x = x + self.attend(y, y, y, need_weights=False)[0].transpose(0, 1)
        return self.head((x + self.outer(F.gelu(self.inner(x))))[:, 0])


@pytest.fixture
def data():
    return torch.randn(6, 3, 8, 8), torch.randint(5, (6,))


def graph(model, x):
    with warnings.catch_warnings():  # of lone parameters
        warnings.simplefilter("ignore", UserWarning)
        return tp.DependencyGraph().build_dependency(model, x[:1])


def removed(model, x, group, scores, sets):
    """Return the sum of the scores that are gone when a set of channels is pruned.

    Torch-Pruning cuts ``.grad`` as it cuts the weights.
    """
    first, found = group[0].dep, []
    names = {m: n for n, m in model.named_modules()}
    for channels in sets:
        cut = copy.deepcopy(model).double()
        for name, p in cut.named_parameters():
            p.grad = scores[name].to(p)
        layer = cut.get_submodule(names[first.target.module])
        graph(cut, x.double()).get_pruning_group(layer, first.handler, channels).prune()
        left = sum(p.grad.double().sum() for p in cut.parameters())
        found.append(sum(s.double().sum() for s in scores.values()) - left)
    return torch.stack(found)


@pytest.mark.parametrize("kind", [Residual, Attention])
def test_importance_is_what_removal_takes_away(kind, data):
    x, y = data
    model = kind()
    weights = dict(model.named_parameters())
    found = truth.moments(model, x, y, weights)  # a float64 loop over samples
    scores = {n: w.detach() ** 2 * found[n][1] / 2 for n, w in weights.items()}
    importance, groups = FisherImportance(model, [(x, y)]), []
    for group in graph(model, x).get_all_groups():
        each, parts = importance(group), 1
        if any(
            item.dep.target.module is getattr(model, "grouped", 0) for item in group
        ):
            parts = 2  # both halves lose the same channels
        size = len(each) // parts
        sets = [[*range(i, len(each), size)] for i in range(size)]
        expected = removed(model, x, group, scores, sets)
        each, tiny = each.view(parts, -1).sum(0), 1e-6 * float(expected.max())
        assert torch.allclose(each, expected, rtol=1e-4, atol=tiny)
        groups.append(len(group))
    assert len(groups) >= 3 and max(groups) > 5


def test_inputs_of_a_grouped_convolution_are_those_of_their_group(data):
    model = Residual()
    group = graph(model, data[0]).get_pruning_group(
        model.up, tp.prune_conv_out_channels, list(range(8))
    )
    sizes = {n: p.detach().abs() for n, p in model.named_parameters()}
    expected = sizes["up.weight"].flatten(1).sum(1) + sizes["up.bias"]
    for i in range(8):
        half = slice(6 * (i // 4), 6 * (i // 4) + 6)
        expected[i] += sizes["grouped.weight"][half, i % 4].sum()
    found = FisherImportance(model, [data], "magnitude")(group)
    assert torch.allclose(found.float(), expected)


def test_a_part_of_the_channels(data):
    x, y = data
    model = Residual()
    importance, dependencies = (
        FisherImportance(model, [(x, y)], "snip"),
        graph(model, x),
    )
    whole, part = (
        dependencies.get_pruning_group(
            model.first, tp.prune_conv_out_channels, channels
        )
        for channels in (list(range(6)), [1, 4])
    )
    assert torch.equal(importance(whole)[[1, 4]], importance(part))


def test_their_hessian_importance_keeps_the_last_sample(data):
    x, y = data
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    group = graph(model, x).get_pruning_group(
        model[0], tp.prune_conv_out_channels, list(range(4))
    )

    def theirs(samples):
        scorer = tp.importance.GroupHessianImportance(
            group_reduction="sum", normalizer=None, bias=True
        )
        for i in samples:
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            scorer.accumulate_grad(model)
        return scorer(group)

    if not torch.allclose(theirs(range(6)), last := theirs([5])):
        pytest.skip("this release of Torch-Pruning keeps all samples")
    ours = 2 * FisherImportance(model, [(x, y)])(group).float()
    assert torch.allclose(ours, sum(theirs([i]) for i in range(6)) / 6, rtol=1e-4)
    alone = FisherImportance(model, [(x[5:], y[5:])])
    assert torch.allclose(2 * alone(group).float(), last, rtol=1e-4)


@pytest.mark.parametrize("kind", [Residual, Attention])
def test_pruners_prune_step_by_step(kind, data):
    x, y = data
    model, seen = kind(), []

    class Batches:
        def __iter__(self):
            seen.append(1)
            return iter([(x, y)])

    importance = FisherImportance(model, Batches(), "fts", group_size=2)
    heads = {model.attend: 2} if kind is Attention else {}
    before = sum(p.numel() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pruner = tp.pruner.BasePruner(
            model, x[:1], importance, global_pruning=True, pruning_ratio=0.5,
            iterative_steps=2, ignored_layers=[model.head], num_heads=heads,
        )  # fmt: skip
    pruner.step()
    assert len(seen) == 1  # for all groups
    pruner.step()
    assert len(seen) == 2  # what is left is scored anew
    assert sum(p.numel() for p in model.parameters()) < before
    assert model(x).shape == (6, 5)


def test_the_channels_of_high_importance_stay(data):
    x, y = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5))
    importance = FisherImportance(model, [(x, y)])
    pruner = tp.pruner.BasePruner(
        model, x[:1], importance, pruning_ratio=0.5, ignored_layers=[model[3]]
    )
    group = pruner.DG.get_pruning_group(
        model[1], tp.prune_linear_out_channels, list(range(8))
    )
    kept = importance(group).topk(4).indices.sort().values
    expected = model[1].weight[kept], model[3].weight[:, kept]
    pruner.step()
    assert torch.equal(model[1].weight, expected[0])
    assert torch.equal(model[3].weight, expected[1])


def test_changed_weights_are_scored_anew(data):
    x, y = data
    model = Residual()
    importance, batches = FisherImportance(model, [(x, y)], "magnitude"), [(x, y)]
    group = graph(model, x).get_pruning_group(
        model.up, tp.prune_conv_out_channels, list(range(8))
    )
    before = importance(group)
    with torch.no_grad():
        model.up.weight.mul_(3)
    after = importance(group)
    assert not torch.equal(before, after)
    again = FisherImportance(model, batches, "magnitude")(group)
    assert torch.equal(after, again)


def test_a_group_of_another_model(data):
    x, y = data
    model = Residual()
    group = next(iter(graph(copy.deepcopy(model), x).get_all_groups()))
    with pytest.raises(
        FisherpruneError, match="group must be of the model that Fisher"
    ):
        FisherImportance(model, [(x, y)])(group)


def test_mistakes_of_scoring_are_named(data):
    model = Residual()
    group = next(iter(graph(model, data[0]).get_all_groups()))
    with pytest.raises(FisherpruneError, match="unknown criterion 'best'"):
        FisherImportance(model, [data], "best")(group)


def test_the_example():
    module = sys.modules[FisherImportance.__module__]
    assert doctest.testmod(module).failed == 0
