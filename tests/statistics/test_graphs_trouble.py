"""Trouble with a graph, and errors in batches that run as one.

The CPU has a twin of CUDA's graphs.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from cpu_graph import CpuGraph
from graph_checks import assert_same, both, every
from nets import batches, conv_net, data
from torch import nn

import fisherprune as fp
from fisherprune.statistics import driver
from fisherprune.statistics.recording import UnfitError
from fisherprune.statistics.structure import tensors_in

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5


class Fails(CpuGraph):
    @contextmanager
    def recording(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield


class Waits(CpuGraph):
    @contextmanager
    def warming_up(self):
        yield
        raise UnfitError("a function waits for the device")


class FailsInside(CpuGraph):
    @contextmanager
    def recording(self):
        with super().recording():
            yield
        raise RuntimeError("operation failed due to a previous error during capture")


class Forgets(CpuGraph):
    def replay(self):
        self.calls, every = self.calls[:-1], self.calls
        super().replay()
        self.calls = every


class Overflows(CpuGraph):
    def replay(self):
        super().replay()
        raise torch.OutOfMemoryError("CUDA out of memory")


TROUBLE = {
    Fails: "OutOfMemoryError|out of memory",
    Waits: "waits for the device",
    FailsInside: "previous error during capture",
    Forgets: "finds other sums of another batch",
    Overflows: "out of memory",
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_with_a_graph_changes_nothing(kind, cpu_graphs):
    cpu_graphs.kind = kind
    some = batches(*data((3, 9, 9), 24, CLASSES), 4)
    found, expected, (warned,) = both(conv_net().eval(), some)
    assert_same(found, expected)
    assert any(text in warned for text in TROUBLE[kind].split("|"))


# Errors in a batch that runs as a graph.


def test_labels_that_are_no_classes(cpu_graphs):
    some = batches(*data((6,), 28, CLASSES), 4)
    some[4][1][2] = CLASSES + 2
    message = rf"labels must lie in \[0, {CLASSES}\), .* to {CLASSES + 2}"
    model = nn.Linear(6, CLASSES)
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, some, cuda_graph=True, parameters=every(model))
    assert cpu_graphs.replays


class Late:
    """Verdicts of a device that is slow: each is known when it was given all."""

    def __init__(self):
        self.open = []

    def expect(self, conditions):
        self.open += [(each, each.holds.clone()) for each in conditions]

    def settle(self):
        for condition, holds in self.open:
            if not holds:
                raise condition.error()


def test_an_error_that_is_known_when_other_batches_ran(cpu_graphs, monkeypatch):
    monkeypatch.setattr(driver, "Verdicts", Late)
    some = batches(*data((6,), 28, CLASSES), 4)
    some[4][1][2] = -7
    model, message = nn.Linear(6, CLASSES), r"labels must lie in .* got -7 to"
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, some, cuda_graph=True, parameters=every(model))
    assert cpu_graphs.replays == 6


class Breaks(CpuGraph):
    """From its third replay on, verdicts are that conditions don't hold."""

    def replay(self):
        super().replay()
        if self.replays > 2:
            for *_, results in self.calls:
                for tensor in tensors_in(results):
                    if tensor.dtype == torch.bool and not tensor.dim():
                        tensor.fill_(False)


def test_a_graph_whose_verdicts_are_others(cpu_graphs):
    cpu_graphs.kind = Breaks
    some = batches(*data((6,), 28, CLASSES), 4)
    model, message = nn.Linear(6, CLASSES), "cuda_graph must be False .* of batch 3 can"
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, some, cuda_graph=True, parameters=every(model))


@pytest.mark.parametrize("number", [2, 4, 6])
def test_a_loss_that_is_not_finite(number, cpu_graphs):
    some = batches(*data((6,), 28, CLASSES), 4)
    some[number][0][1] = torch.inf
    model, message = nn.Linear(6, CLASSES), r"finite, got (nan|-?inf) for sample 1"
    with pytest.raises(fp.FisherpruneError, match=message):
        fp.gradient_moments(model, some, cuda_graph=True, parameters=every(model))


def test_a_model_is_left_as_it_was_found(cpu_graphs):
    model = conv_net().train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    some = batches(*data((3, 9, 9), 24, CLASSES), 4)
    random = torch.get_rng_state()

    def failing():
        yield from some
        raise KeyError("end")

    for source in (some, failing()):
        try:
            fp.gradient_moments(model, source, cuda_graph=True)
        except KeyError:
            pass
        assert all(module.training for module in model.modules())
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), random)
    assert cpu_graphs.replays == 10
    copy.deepcopy(model)
