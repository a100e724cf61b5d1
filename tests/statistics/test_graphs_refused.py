"""Batches that can't run as one graph run without, and a warning says why.

The CPU has a twin of CUDA's graphs.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from graph_checks import assert_same, both, every
from nets import Own, batches, data
from torch import nn

import fisherprune as fp
from fisherprune.statistics.recording import Watch

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5


class Counting(nn.Module):
    """Another function in each batch, or so it seems."""

    def __init__(self):
        super().__init__()
        self.head, self.calls = nn.Linear(6, CLASSES), 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.ones(6))


class CountsCalls(Counting):
    def forward(self, x):
        self.calls += 1
        return self.head(x)


class CountsInBuffer(Counting):
    def forward(self, x):
        self.seen += 1
        return self.head(x) + 1e-6 * self.seen


class ReplacesBuffer(Counting):
    def forward(self, x):
        self.scale = self.scale.clone()
        return self.head(x * self.scale)


class ReadsValues(Counting):
    def forward(self, x):
        return self.head(x) * 2 if x.isnan().any().item() else self.head(x)


class ReadsMask(Counting):
    def forward(self, x):
        x = x.clone()
        x[x > 0] *= 2
        return self.head(x)


class PicksRows(Counting):
    def forward(self, x):
        return self.head(x.index_add(1, x.new_ones(6).nonzero().flatten(), x))


class MakesTensors(Counting):
    def forward(self, x):
        return self.head(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


class OwnGenerator(Counting):
    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        return self.head(x + torch.rand(6, generator=generator))


class UsesDevices(Counting):
    def forward(self, x):
        return self.head(x) * len(x.to("meta")) / len(x)


class RunsAlone(Counting):
    def forward(self, x):
        return torch.func.vmap(self.head)(x)


UNFIT = {
    CountsCalls: "changes attributes or buffers",
    CountsInBuffer: "changes attributes or buffers",
    ReplacesBuffer: "changes attributes or buffers",
    ReadsValues: "_local_scalar_dense reads values",
    ReadsMask: "index reads values",
    PicksRows: "nonzero reads values",
    MakesTensors: "a tensor is made of numbers of Python",
    OwnGenerator: "draws from a generator of its own",
    UsesDevices: "copies from one device to another",
    RunsAlone: "once more for each sample alone",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_models_that_are_no_graph(kind, cpu_graphs):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(kind(), some)
    assert_same(found, expected)
    assert not cpu_graphs.replays
    (text,) = warned
    assert "batches ran without a graph, as ever" in text and UNFIT[kind] in text


def test_scored_embeddings_read_values(cpu_graphs):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, CLASSES))
    x, y = torch.randint(7, (24, 3)), torch.randint(CLASSES, (24,))
    found, expected, warned = both(model, batches(x, y, 4))
    assert_same(found, expected)
    assert not cpu_graphs.replays and "reads" in warned[0]


def test_losses_times_a_power_of_two_read_values(cpu_graphs):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(
        nn.Linear(6, CLASSES), some, loss_fn=lambda o, y: F.cross_entropy(o, y) * 1e-25
    )
    assert_same(found, expected)
    assert found.exponent and cpu_graphs.replays == 5  # of the first pass
    assert "_local_scalar_dense reads values" in warned[0]


def test_what_python_does_otherwise_in_the_third_batch_is_seen(cpu_graphs):
    """It decides by what is no attribute of a module."""
    factor = [1]
    x, y = data((6,), 24, CLASSES)

    class Growing:
        def __iter__(self):
            for factor[0], batch in enumerate(batches(x, y, 4)):
                factor[0] = max(factor[0], 1)
                yield batch

    model = Own(lambda m, x: m.head(x) * factor[0], head=nn.Linear(6, CLASSES))
    found, expected, (warned,) = both(model, Growing())
    assert_same(found, expected)
    assert cpu_graphs.replays == 1 and "finds other sums of another batch" in warned


def test_gradients_that_come_another_way_when_a_batch_is_recorded(cpu_graphs):
    calls = itertools.count()

    def run(self, x):
        if next(calls) < 4:  # two for the first batch, one for the second, one more
            return self.head(x)
        return torch.func.vmap(self.head)(x)

    x, y = data((6,), 24, CLASSES)
    model, own = nn.Linear(6, CLASSES), batches(x, y, 4)
    other = Own(run, head=model)
    expected = fp.gradient_moments(model, own, parameters=every(model))
    with pytest.warns(fp.FisherpruneWarning, match="come another way than"):
        found = fp.gradient_moments(
            other, own, cuda_graph=True, parameters=every(model)
        )
    assert not cpu_graphs.replays
    for name in expected.sum:
        torch.testing.assert_close(found.sum[name], expected.sum[name])
        torch.testing.assert_close(found.sum_sq[name], expected.sum_sq[name])


def test_memory_that_is_read_and_not_made_is_kept():
    x, z = torch.randn(3), torch.randn(3)
    with Watch() as watch:
        y = (x[1:] * 2).exp()
        y.add_(z[:2])
        z.zero_()
    own = {each.untyped_storage().data_ptr() for each in (x, z)}
    assert {each.data_ptr() for each in watch.read.values()} == own
    assert not watch.reason


def test_a_model_that_changes_between_batches(cpu_graphs):
    """Its weights, which a graph would read; but what is computed from them is kept."""
    x, y = data((3, 5, 5), 36, CLASSES)

    def changing(model):
        for i, batch in enumerate(batches(x, y, 6)):
            if i == 4:
                with torch.no_grad():
                    model[1].running_var.mul_(4)
            yield batch

    make = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, CLASSES)
    model = nn.Sequential(*make).eval()
    other = copy.deepcopy(model)
    expected = fp.gradient_moments(other, changing(other))
    with pytest.warns(fp.FisherpruneWarning, match="not what it was"):
        found = fp.gradient_moments(model, changing(model), cuda_graph=True)
    assert_same(found, expected)
    assert cpu_graphs.replays == 3


def test_batches_of_very_many_kinds(cpu_graphs):
    x, y = data((120, 2), 240, CLASSES)
    some = [(x[i : i + 2, : 1 + i // 2], y[i : i + 2]) for i in range(0, 240, 2)]
    model = Own(lambda m, x: m.head(x).mean(1), head=nn.Linear(2, CLASSES))
    found, expected, (warned,) = both(model, some + some)
    assert_same(found, expected)
    assert not cpu_graphs and "no batch is like another" in warned
    found, expected, warned = both(model, some[:90] + some[:90])
    assert_same(found, expected)
    assert cpu_graphs and not warned


def test_inputs_whose_gradient_is_wanted(cpu_graphs):
    x, y = data((6,), 24, CLASSES)

    def run(self, x):
        return self.head(x) * (1.0 if x.requires_grad else 2.0)

    some = [(x.requires_grad_(), y) for x, y in batches(x, y, 4)]
    found, expected, (warned,) = both(Own(run, head=nn.Linear(6, CLASSES)), some)
    assert_same(found, expected)
    assert not cpu_graphs and "no batch is like another" in warned


def test_groups_of_very_many_samples(cpu_graphs):
    x, y = data((6,), 600 * 4, CLASSES)
    model = nn.Linear(6, CLASSES)
    found, expected, (warned,) = both(model, batches(x, y, 600), group_size=600)
    assert_same(found, expected)
    assert not cpu_graphs and "groups have more than 512 samples" in warned


def test_sums_that_are_kept_elsewhere(cpu_graphs, tmp_path):
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(nn.Linear(6, CLASSES), some, offload=tmp_path)
    assert_same(found, expected)
    assert not cpu_graphs.replays and "sums are kept elsewhere" in warned[0]


def test_devices_without_graphs_run_as_ever():
    some = batches(*data((6,), 24, CLASSES), 4)
    found, expected, warned = both(nn.Linear(6, CLASSES), some)
    assert_same(found, expected)
    assert "the model must be on cuda, got cpu" in warned[0]


def test_sampled_labels_are_refused():
    with pytest.raises(
        fp.FisherpruneError, match="cuda_graph must be False where labels are sampled"
    ):
        fp.Settings(labels="sampled", cuda_graph=True)
    with pytest.raises(
        fp.FisherpruneError, match="cuda_graph must be True or False, got 1"
    ):
        fp.Settings(cuda_graph=1)
