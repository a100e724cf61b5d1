"""Losses of all samples by one call: as those of each sample alone, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherprune as fp
from fisherprune.statistics.losses_together import losses_together

LOSSES = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "others ignored": nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1),
    "others ignored, sum": nn.CrossEntropyLoss(ignore_index=2, reduction="sum"),
}


def drawn(*positions):
    outputs = torch.randn(9, 5, *positions, dtype=torch.double, requires_grad=True)
    return outputs, torch.randint(5, (9, *positions))


@pytest.mark.parametrize("positions", [(), (7,), (3, 4)], ids=str)
@pytest.mark.parametrize("what", LOSSES)
def test_equal_those_of_each_sample_alone(what, positions):
    outputs, labels = drawn(*positions)
    loss_fn = LOSSES[what]
    ignored = loss_fn.ignore_index if isinstance(loss_fn, nn.Module) else -100
    if positions:
        labels[::2, 0] = ignored
        labels[:, 1] = 3  # each sample has a position that counts
    elif ignored >= 0:
        labels[labels == ignored] = 0
    found = losses_together(loss_fn, outputs, labels)
    wanted = torch.stack(
        [loss_fn(o[None], y[None]) for o, y in zip(outputs, labels, strict=True)]
    )
    factors = torch.rand(9, dtype=torch.double)
    gradients = (
        torch.autograd.grad((each * factors).sum(), outputs) for each in (found, wanted)
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*gradients)


def test_a_sample_without_a_label_has_no_mean():
    outputs, labels = drawn(4)
    labels[3] = -100
    found = losses_together(F.cross_entropy, outputs, labels)
    assert found.isnan().nonzero().tolist() == [[3]]
    net = nn.Conv1d(5, 5, 1)
    with pytest.raises(fp.FisherpruneError, match="finite, got nan for sample 3"):
        fp.gradient_moments(net, [(outputs.detach().float(), labels)], F.cross_entropy)


def test_a_label_that_is_no_class_is_refused():
    outputs, labels = drawn()
    labels[4] = 5
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        losses_together(F.cross_entropy, outputs, labels)


class OwnLoss(nn.CrossEntropyLoss):
    """A loss of which nothing is known."""

    def forward(self, input, target):
        return super().forward(input, target) * 2


def hooked():
    loss_fn = nn.CrossEntropyLoss()
    loss_fn.register_forward_hook(lambda *_: None)
    return loss_fn


def test_others_are_not_read():
    outputs, labels = drawn()
    others = [
        lambda o, y: F.cross_entropy(o, y),
        OwnLoss(),
        hooked(),
        nn.CrossEntropyLoss(torch.rand(5).double(), reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        F.nll_loss,
    ]
    for loss_fn in others:
        assert losses_together(loss_fn, outputs, labels) is None
    for other in (outputs.detach().softmax(1), labels[:, None], labels.byte()):
        assert losses_together(F.cross_entropy, outputs, other) is None
    assert losses_together(F.cross_entropy, outputs[:, 0], labels) is None
