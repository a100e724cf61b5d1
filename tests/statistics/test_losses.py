"""Losses of single samples: shapes, reductions, and functions that are none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_losses, assert_moments, refused
from nets import Mixing, batches, data
from torch import nn

import fisherprune as fp
from fisherprune.errors import FisherpruneWarning
from fisherprune.statistics.hessian_gradient import hessian_gradient_product
from fisherprune.statistics.losses import (
    SampleLosses,
    checked_losses,
    checked_sample_losses,
)


def network():
    return Mixing(lambda _, h: torch.tanh(h))


def test_one_number_a_sample_needs_a_loss():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0))
    x, y = torch.randn(8, 4), torch.rand(8)
    refused(
        model, x, y, r"output must be \[N, classes, ...\] .*, got \[8\]: give a los"
    )
    parameters = fp.prunable_parameters(model)
    expected = truth.moments(model, x, y.double(), parameters, loss_fn=F.mse_loss)
    assert_moments(fp.gradient_moments(model, batches(x, y, 3), F.mse_loss), expected)


def test_labels_of_other_shapes():
    x, y = data((4,))
    for labels, came in (
        (y[:, None], r"int64 \[13, 1\]"),
        (F.one_hot(y, 5), r"int64 \[13, 5\]"),
        (y.float(), r"float32 \[13\]"),
    ):
        match = r"labels must be class numbers, integers \[13\], or probabilities, floa"
        refused(network(), x, labels, match + rf".* \[13, 5\], .*, got {came}")


def test_sequences_have_their_classes_second():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)), torch.randn(9, 3, 4)
    y = torch.randint(5, (9, 3))
    refused(model, x, y, r"integers \[9, 5\], .* got int64 \[9, 3\]")
    loss_fn = lambda o, y: F.cross_entropy(o.mT, y)  # noqa: E731
    expected = truth.moments(model, x, y, ["0.weight"], loss_fn=loss_fn)
    assert_moments(fp.gradient_moments(model, [(x, y)], loss_fn), expected)


@pytest.mark.parametrize(
    "loss_fn, came",
    [
        (lambda o, y: F.cross_entropy(o, y).item(), "float"),
        (lambda o, y: (F.cross_entropy(o, y), 1), "tuple"),
        (lambda o, y: None, "NoneType"),
    ],
)
def test_losses_that_are_no_tensors(loss_fn, came):
    x, y = data((4,))
    match = f"loss_fn must return a tensor, got {came}"
    refused(network(), x, y, match, loss_fn=loss_fn)


@pytest.mark.parametrize("loss_fn", ["cross_entropy", nn.CrossEntropyLoss])
def test_losses_that_are_no_functions(loss_fn):
    model, (x, y) = network(), data((4,))
    match = r"loss_fn must be a function .*nn.CrossEntropyLoss\(\), got .*ross"
    refused(model, x, y, match, loss_fn=loss_fn)
    with pytest.raises(fp.FisherpruneError, match=match):
        hessian_gradient_product(model, [(x, y)], loss_fn)


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_need_a_sum(kind):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.LogSoftmax(1))
    (x, y), weight = data((4,)), torch.rand(5) + 0.1
    match = f"{kind.__name__} with class weights must have reduction='sum', got 'mean'"
    refused(model, x, y, match, loss_fn=kind(weight=weight))
    expected = truth.moments(
        model, x, y, ["0.weight"], loss_fn=kind(weight.double(), reduction="sum")
    )
    for reduction in ("sum", "none"):
        loss_fn = kind(weight, reduction=reduction)
        assert_moments(fp.gradient_moments(model, [(x, y)], loss_fn), expected)
    fp.gradient_moments(model, [(x, y)], kind())


def test_element_weights_may_be_averaged():
    model, (x, _) = network(), data((4,))
    y, weight = torch.rand(13, 5), torch.rand(5)
    names = fp.prunable_parameters(model)
    loss_fn = nn.BCEWithLogitsLoss(weight)
    expected = truth.moments(
        model, x, y.double(), names, loss_fn=nn.BCEWithLogitsLoss(weight.double())
    )
    assert_moments(fp.gradient_moments(model, [(x, y)], loss_fn), expected)


def test_means_over_positions_stay_means():
    model = nn.Sequential(nn.Conv1d(4, 6, 2), nn.Tanh(), nn.Conv1d(6, 5, 1))
    x, y = torch.randn(7, 4, 9), torch.randint(5, (7, 8))
    mean, total = (
        fp.gradient_moments(model, [(x, y)], nn.CrossEntropyLoss(reduction=r)).mean
        for r in ("mean", "sum")
    )
    assert truth.relative_error(mean["0.weight"] * 8, total["0.weight"].double()) < 1e-5


def test_one_class_has_no_loss():
    net, x = nn.Linear(4, 1), torch.randn(5, 4)
    with pytest.raises(fp.FisherpruneError, match=r"at least two classes .* \[5, 1\]"):
        fp.gradient_moments(net, [(x, torch.zeros(5).long())], parameters=named(net))


@pytest.mark.parametrize("change", [lambda p: 2 * p, lambda p: p - 0.5])
def test_floating_point_labels_are_probabilities(change):
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    right = torch.randn(5, 3).softmax(1)
    fp.gradient_moments(net, [(x, right)], parameters=named(net))
    with pytest.raises(
        fp.FisherpruneError, match="must be probabilities .* with sum 1"
    ):
        fp.gradient_moments(net, [(x, change(right))], parameters=named(net))


def test_positions_and_classes_of_one_number_are_asked_for():
    net, x, y = nn.Linear(4, 6), torch.randn(5, 6, 4), torch.randint(6, (5, 6))
    with pytest.raises(fp.FisherpruneError, match="may be .N, classes, positions. or"):
        fp.gradient_moments(net, [(x, y)], parameters=named(net))
    fp.gradient_moments(net, [(x, y)], F.cross_entropy, parameters=named(net))


def unlikely():
    """Return a network, samples and weights, both greatest for the rarest class."""
    net, x, y = nn.Linear(4, 3), torch.randn(50, 4), torch.arange(50) % 3
    with torch.no_grad():
        net.bias[1] -= 9

    def weighted(outputs, labels):
        return F.cross_entropy(outputs, labels, torch.tensor([1.0, 1.5, 1.0]))

    return net, (x, y), weighted


def test_a_loss_that_is_not_of_its_samples_is_told():
    net, batch, weighted = unlikely()
    with pytest.warns(FisherpruneWarning, match="loss_fn: of the first batch"):
        fp.gradient_moments(net, [batch], weighted, parameters=named(net))


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy, nn.CrossEntropyLoss()])
def test_losses_of_a_function_of_outputs(loss_fn):
    net, x, y = nn.Linear(4, 3), torch.randn(7, 4), torch.randint(3, (7,))
    of_outputs = SampleLosses(loss_fn)
    assert_losses(
        lambda m, batch: of_outputs(m(batch[0]), batch[1]),
        net,
        (x, y),
        lambda m, one: F.cross_entropy(m(one[0]), one[1]),
    )


def test_losses_of_a_function_of_outputs_are_checked_as_ever():
    net, (x, y), weighted = unlikely()
    losses, outputs = SampleLosses(weighted), net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses(outputs[:1], y[:1])  # a lone sample is no batch
    with pytest.warns(FisherpruneWarning, match="loss_fn: of the first batch it is"):
        losses(outputs, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses(outputs, y)  # not the first one
    match = r"labels must lie in \[0, 3\).* to be ignored give loss_fn="
    with pytest.raises(fp.FisherpruneError, match=match):
        SampleLosses(None)(outputs, y + 1)
    for other, got in (
        ({"out": outputs}, r"dict of \(out: Tensor \[.*\]\)"),
        ((outputs, outputs), r"tuple of \(Tensor .*\)"),
        (outputs[1:], r"Tensor \[.*\]"),
    ):
        match = rf"output must be a tensor with .*, got {got}: for others give losses"
        with pytest.raises(fp.FisherpruneError, match=match):
            SampleLosses(None)(other, y)


@pytest.mark.parametrize("losses", [None, "losses", nn.Linear, nn.CrossEntropyLoss()])
def test_losses_of_batches_that_are_no_functions(losses):
    match = r"losses must be a function \(model, batch\) -> Tensor \[N\], .*, got "
    with pytest.raises(fp.FisherpruneError, match=match):
        checked_losses(losses)
    assert checked_losses(fp.losses.binary) is fp.losses.binary


@pytest.mark.parametrize(
    "returned, got",
    [
        (None, "NoneType"),
        ([1.0] * 4, "list"),
        (torch.zeros(()), r"float32 \[\]"),
        (torch.zeros(3), r"float32 \[3\]"),
        (torch.zeros(4, 1), r"float32 \[4, 1\]"),
        (torch.zeros(4, dtype=torch.long), r"int64 \[4\]"),
        (torch.zeros(4, dtype=torch.cfloat), r"complex64 \[4\]"),
    ],
)
def test_results_that_are_not_a_loss_for_each_sample(returned, got):
    match = (
        rf"one floating-point loss for each of the batch's 4 .*\[4\], got {got}: red"
    )
    with pytest.raises(fp.FisherpruneError, match=match):
        checked_sample_losses(returned, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_results_that_are_not_finite(bad):
    losses = torch.rand(4, requires_grad=True) * torch.tensor([1, 1, bad, 1])
    with pytest.raises(fp.FisherpruneError, match=f"finite, got {bad} for sample 2 of"):
        checked_sample_losses(losses, 4)


def test_results_that_depend_on_nothing():
    with pytest.raises(fp.FisherpruneError, match="depend on any parameter of the mod"):
        checked_sample_losses(torch.rand(4), 4)
    losses = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert checked_sample_losses(losses, 4) is losses


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_its_samples_warns_of_nothing(reduction):
    net, x, y = nn.Linear(4, 3), torch.randn(50, 4), torch.randint(3, (50,))
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch gives some warnings once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_fn = nn.CrossEntropyLoss(reduction=reduction)
            fp.gradient_moments(net, [(x, y)], loss_fn, parameters=named(net))
    finally:
        torch.set_warn_always(before)


def test_ranks_that_score_apart_are_told(monkeypatch):
    net, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(3, (5,)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for ranks in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda n=ranks: n)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fp.score(net, [batch], "snip", parameters=named(net))
        assert any("give process_group" in str(w.message) for w in told) == (ranks == 2)


def named(net):
    return dict(net.named_parameters())
