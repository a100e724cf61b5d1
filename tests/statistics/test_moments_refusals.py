"""Where the moments would be wrong, the pass says so."""

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments, refused
from nets import Mixing, Own, batches, conv_net, data
from torch import nn

import fisherprune as fp


@pytest.mark.parametrize(
    "mix",
    [
        lambda _, h: h - h.mean(0),
        lambda _, h: h.flip(0),
        lambda _, h: torch.nn.functional.dropout(h, 0.5),
        lambda _, h: torch.einsum("nh,mh->nm", h, h).div(64).softmax(1) @ h,
    ],
    ids=["mean", "flip", "dropout", "attention"],
)
def test_samples_that_mix_are_refused(mix):
    x, y = data((4,))
    # Wide: two random masks of dropout that agree would not be noticed.
    refused(Mixing(mix, 64), x, y, "samples mix: the model's output for a sample alone")


class FewSlots(Mixing):
    """Only the first samples of a batch find room in a layer."""

    def forward(self, x):
        room = torch.arange(len(x)) < 4
        return self.head(x + self.fc(x) * room[:, None])


class BatchSecond(Mixing):
    """Reads samples as time steps, as a recurrent layer without ``batch_first``."""

    def __init__(self, mix=None):
        super().__init__(mix)
        self.recurrent = nn.LSTM(4, 4)

    def forward(self, x):
        return self.head(self.fc(self.recurrent(x)[0]).mean(1))


@pytest.mark.parametrize("make, shape", [(FewSlots, (4,)), (BatchSecond, (3, 4))])
def test_what_only_later_samples_feel_is_refused(make, shape):
    x, y = data(shape)
    refused(make(None), x, y, "samples mix")


def test_samples_are_told_apart_in_the_first_batch_that_has_two():
    model, (x, y) = Mixing(lambda _, h: h - h.mean(0)), data((4,))
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        fp.gradient_moments(model, [(x[:1], y[:1]), (x[1:], y[1:])])


def test_outputs_of_another_shape_alone_are_refused():
    model, (x, y) = Mixing(lambda _, h: h), data((4,))
    model.forward = lambda x: Mixing.forward(model, x)[:, : 1 + len(x)]
    refused(model, x[:3], y[:3] % 2, "samples mix")


@pytest.fixture
def matmul_precision():
    """Set the precision of products on the CPU; put it back in the end."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    yield lambda value: setattr(backend, "fp32_precision", value)
    backend.fp32_precision = before


def test_lower_precision_widens_what_counts_as_the_same(matmul_precision):
    # The output of a sample in a batch is another by 5e-3 of itself.
    model, (x, y) = Mixing(lambda _, h: h), data((4,))
    model.forward = lambda x: Mixing.forward(model, x) * (1 + 5e-3 * (len(x) > 1))
    matmul_precision("ieee")
    refused(model, x, y, "samples mix")
    matmul_precision("tf32")
    fp.gradient_moments(model, [(x, y)])


def test_batchnorm_with_batch_statistics_is_refused():
    x, y = data((3, 9, 9))
    model = conv_net()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    refused(model, x, y, "BatchNorm layer uses batch statistics")


class NormalizedWeight(nn.Conv2d):
    """Standardizes its weight by ``batch_norm``, as NFNets do."""

    def forward(self, x):
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


@pytest.mark.parametrize("size", [1, 13])
def test_batch_norm_of_a_weight_mixes_no_samples(size):
    layers = NormalizedWeight(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5)
    model, (x, y) = nn.Sequential(*layers), data((3, 5, 5))
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches(x, y, size), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


def test_a_penalty_of_a_weight_is_part_of_each_samples_loss():
    model, (x, y) = Mixing(lambda m, h: h), data((4,))
    rows = []

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + model.fc.weight.norm()

    for i in range(13):
        one = loss(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(one, model.fc.weight)[0].double())
    expected = torch.stack(rows)
    found = fp.gradient_moments(model, [(x, y)], loss)
    wanted = expected.mean(0), expected.square().mean(0)
    assert_moments(found, {"fc.weight": wanted})


def test_gradients_that_overflow_name_the_parameter():
    model, (x, y) = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), data((4,))
    refused(
        model,
        x * 1e25,
        y,
        "the mean squared gradient of '0.weight' is NaN or infinite",
        loss_fn=lambda o, t: o.sum(),
    )


def test_outputs_that_are_no_predictions():
    model, (x, y) = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), data((4,))
    parameters = dict(model.named_parameters())
    refused(model, x, y, "13 samples as its", parameters=parameters)


def test_loss_without_parameters():
    model, (x, y) = Mixing(lambda _, h: h.detach()), data((4,))
    model.head.requires_grad_(False)
    refused(model, x, y, "does not depend on any parameter")


class Sorted(Mixing):
    """Sorts its samples before the first layer and back after it."""

    def forward(self, x):
        order = x.norm(dim=1).argsort()
        return self.head(torch.tanh(self.fc(x[order]))[order.argsort()] + self.fc(x))


def test_samples_that_change_places():
    model, (x, y) = Sorted(None), data((4,))
    x *= torch.arange(13, 0, -1)[:, None]
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))
    assert found.paths["fc.weight"] == ("linear",)


class Penalized(Mixing):
    """Leaves a penalty of the whole batch behind, as variational models do."""

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        self.penalty = h.square().sum()
        return self.head(h)


def test_a_loss_that_reads_what_the_model_made_of_the_batch_is_refused():
    model, (x, y) = Penalized(None), data((4,))

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + model.penalty

    refused(model, x, y, "samples mix: the loss of a sample alone", loss_fn=loss)


def test_a_model_that_can_not_run_one_sample():
    x, y = data((4,))
    model = Mixing(lambda _, h: h.view(13, 4).cumsum(1))
    match = "must run with one sample, .* alone, the last of the first batch fails: sha"
    refused(model, x, y, match)


def one_by_one(m, x):
    return torch.stack([m(row) for row in x])


def along_its_gradient(m, x):
    start = x.detach().requires_grad_()
    return m(x + torch.autograd.grad(m(start).square().sum(), start)[0])


@pytest.mark.parametrize("run", [one_by_one, along_its_gradient])
def test_inputs_that_a_model_changes_are_not_read_again(run):
    """These models run more than once for a batch."""
    layers, (x, y) = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)),
        data((4,)),
    )
    model = Own(lambda m, x: run(m.layers, x.mul_(2)), layers=layers)
    options = {"parameters": dict(model.named_parameters())}
    match = "must not change its inputs in place, .*in batch 0 .*let it change a copy"
    refused(model, x.clone(), y, match, **options)
    model.run = lambda m, x: run(m.layers, x.mul(2))
    with pytest.warns(fp.FisherpruneWarning, match="ran once more"):
        found = fp.gradient_moments(model, [(x, y)], **options)
    assert_moments(found, truth.moments(model, x, y, options["parameters"]))
