"""gradient_moments and hessian_gradient_product against float64 loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import SequenceNet, TwiceNet, batches, conv_net, randomized
from torch import nn

import fisherprune as fp
from fisherprune.stats import hessian_gradient_product

NETS = {
    "conv": (conv_net, (3, 9, 9)),
    "sequence": (SequenceNet, (4, 12)),
    "twice": (TwiceNet, (4, 8, 8)),
    "twice_depthwise": (lambda: TwiceNet(groups=4), (4, 8, 8)),
}


def data(shape, samples=13, classes=5):
    return torch.randn(samples, *shape), torch.randint(classes, (samples,))


def assert_moments(found, expected, tolerance=1e-5):
    for name, (mean, fisher) in expected.items():
        assert truth.relative_error(found.mean[name], mean) < tolerance, name
        assert truth.relative_error(found.fisher[name], fisher) < tolerance, name


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("group_size", [1, 2, 5, 13, 40])
def test_equals_a_loop_over_groups_whatever_the_batch_size(net, group_size):
    make, shape = NETS[net]
    model, (x, y) = make(), data(shape)
    parameters = dict(model.named_parameters())  # weights, biases, BatchNorm: all
    expected = truth.moments(model, x, y, parameters, group_size)
    for size in (1, 4, 7, 13):
        found = fp.gradient_moments(
            model, batches(x, y, size), group_size=group_size, parameters=parameters
        )
        assert_moments(found, expected)
        assert list(found.mean) == list(found.fisher) == list(parameters)
        assert found.samples == 13
        assert found.groups == -(-13 // group_size)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        lambda out, y: torch.stack(
            [-o.log_softmax(0)[int(label)] for o, label in zip(out, y, strict=True)]
        ).mean(),  # .item() in the loss: vmap can't run it
    ],
    ids=["mean", "sum", "none", "not_vmappable"],
)
def test_reduction_of_the_loss_does_not_matter(loss_fn):
    model, (x, y) = conv_net(), data((3, 9, 9))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model), 2)
    found = fp.gradient_moments(model, batches(x, y, 5), loss_fn, group_size=2)
    assert_moments(found, expected)


def test_a_loss_of_ones_own():
    model, (x, _) = conv_net(), data((3, 9, 9))
    target = torch.randn(13, 5)
    names = fp.prunable_parameters(model)
    expected = truth.moments(
        model, x, target.double(), names, loss_fn=lambda o, t: (o - t).pow(4).sum()
    )
    found = fp.gradient_moments(
        model, batches(x, target, 5), lambda o, t: (o - t).pow(4).sum()
    )
    assert_moments(found, expected)


def test_dense_predictions_average_over_positions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    x, y = torch.randn(6, 3, 7, 7), torch.randint(5, (6, 5, 5))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    assert_moments(fp.gradient_moments(model, batches(x, y, 4)), expected)


def test_class_probabilities_as_labels():
    model, (x, _) = conv_net(), data((3, 9, 9))
    y = torch.rand(13, 5).softmax(1)
    expected = truth.moments(model, x, y.double(), fp.prunable_parameters(model))
    assert_moments(fp.gradient_moments(model, batches(x, y, 5)), expected)


def test_memory_format_and_strides_do_not_matter():
    model, (x, y) = conv_net(), data((3, 9, 9))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    last = x.to(memory_format=torch.channels_last)
    strided = torch.randn(13, 9, 9, 6)[..., ::2].permute(0, 3, 2, 1).copy_(x)
    for inputs in (last, strided):
        assert_moments(fp.gradient_moments(model, batches(inputs, y, 5)), expected)
    model.to(memory_format=torch.channels_last)
    assert_moments(fp.gradient_moments(model, batches(last, y, 5)), expected)


def test_thread_count_does_not_matter_bit_for_bit():
    model, (x, y) = conv_net(), data((3, 9, 9))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fp.gradient_moments(model, [(x, y)]))
    finally:
        torch.set_num_threads(threads)
    for name, fisher in found[0].fisher.items():
        for other in found[1:]:
            # the framework's own layers may round differently
            torch.testing.assert_close(other.fisher[name], fisher, rtol=1e-5, atol=0)


def test_everything_is_left_as_found():
    model, (x, y) = conv_net().train(), data((3, 9, 9))
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    state = torch.random.get_rng_state()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True
    )
    for criterion in fp.criteria()[1:]:
        fp.score(model, loader, criterion)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert hooks == [
        (len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "0.weight")
    assert calls  # hooks of the user's still run


def test_an_error_leaves_modes_as_found_too():
    model, (x, y) = conv_net().train(), data((3, 9, 9))
    with pytest.raises(fp.FisherpruneError):
        fp.gradient_moments(model, [(x, y + 100)])
    assert all(m.training for m in model.modules())


def test_runs_under_no_grad():
    model, (x, y) = conv_net(), data((3, 9, 9))
    with torch.no_grad():
        found = fp.gradient_moments(model, [(x, y)])
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    assert_moments(found, expected)


def test_a_compiled_model_is_scored_eagerly():
    model, (x, y) = conv_net(), data((3, 9, 9))
    found = fp.gradient_moments(torch.compile(model), [(x, y)])
    for name, (_, fisher) in truth.moments(
        model, x, y, fp.prunable_parameters(model)
    ).items():
        assert truth.relative_error(found.fisher[f"_orig_mod.{name}"], fisher) < 1e-5


def test_recomputed_activations_are_refused():
    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(
                torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
            )

    x, y = data((4,))
    refused(Recomputing(), x, y, "activation checkpointing .* switch it off")


def test_parameters_not_reached_have_zero_moments():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    model, (x, y) = Idle(), data((4,))
    found = fp.gradient_moments(
        model, [(x, y)], parameters=dict(model.named_parameters())
    )
    assert not found.fisher["idle.weight"].any()
    assert found.fisher["used.weight"].any()


def test_autocast_computes_in_bfloat16():
    model, (x, y) = conv_net(), data((3, 9, 9))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    with torch.autocast("cpu", torch.bfloat16):
        found = fp.gradient_moments(model, [(x, y)])
    assert_moments(found, expected, tolerance=0.5)
    worst = max(
        truth.relative_error(found.mean[n], m) for n, (m, _) in expected.items()
    )
    assert worst > 1e-4  # it did


def test_tied_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    model, (x, y) = Shared(), data((6,))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters)
    found = fp.gradient_moments(model, batches(x, y, 4), parameters=parameters)
    assert_moments(found, expected)


@pytest.mark.parametrize("group_size", [1, 3])
def test_hessian_gradient_product_equals_double_backpropagation(group_size):
    model, (x, y) = randomized(conv_net()), data((3, 9, 9))
    names = fp.prunable_parameters(model)
    expected = truth.hessian_gradient(model, x, y, names, group_size)
    found_moments = fp.gradient_moments(model, [(x, y)], group_size=group_size)
    found = hessian_gradient_product(model, batches(x, y, 4), found_moments)
    for name, product in expected.items():
        assert truth.relative_error(found[name], product) < 1e-4, name


def test_hessian_pass_refuses_other_data():
    model, (x, y) = conv_net(), data((3, 9, 9))
    moments = fp.gradient_moments(model, [(x, y)])
    with pytest.raises(fp.FisherpruneError, match="same 13 samples again, got 5"):
        hessian_gradient_product(model, [(x[:5], y[:5])], moments)


class Mixing(nn.Module):
    def __init__(self, mix, width=4):
        super().__init__()
        self.fc, self.head = nn.Linear(4, width), nn.Linear(width, 5)
        self.mix = mix

    def forward(self, x):
        return self.head(self.mix(self, self.fc(x)))


def refused(model, x, y, match, **options):
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gradient_moments(model, [(x, y)], **options)


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


def test_batchnorm_with_batch_statistics_is_refused():
    x, y = data((3, 9, 9))
    model = conv_net()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    refused(model, x, y, "BatchNorm layer uses batch statistics")


def test_parameters_used_elsewhere_are_refused():
    x, y = data((4,))
    direct = Mixing(lambda m, h: h @ m.fc.weight)
    refused(direct, x, y, "'fc.weight' is used outside of conv1d, conv2d, linear")
    penalty = Mixing(lambda m, h: h)
    fp.gradient_moments(penalty, [(x, y)])
    refused(
        penalty,
        x,
        y,
        "'fc.weight' is used outside of",
        loss_fn=lambda o, t: F.cross_entropy(o, t) + penalty.fc.weight.norm(),
    )


def test_layers_without_the_samples_first_are_refused():
    x, y = data((6, 4))
    folded = Mixing(lambda _, h: h.view(13, 6, 4).mean(1))
    folded.forward = lambda x: Mixing.forward(folded, x.flatten(0, 1))
    refused(folded, x, y, r"'fc.weight' must have the batch's 13 samples .* \[78, 4\]")


def test_positions_first_are_refused_even_where_they_are_as_many_as_the_samples():
    class PositionsFirst(Mixing):
        def forward(self, x):
            return self.head(self.fc(x.transpose(0, 1)).mean(0))

    x, y = data((13, 4))
    refused(PositionsFirst(None), x, y, r"batch's 1 samples .* \[13, 1, 4\]")


def test_unsupported_layers_are_refused():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 27, 5))
    x, y = data((1, 5, 5, 5))
    refused(model, x, y, "'0.weight' is used outside of")


def test_bad_arguments():
    model, (x, y) = conv_net(), data((3, 9, 9))
    for size in (0, -1, 1.5, True, "2"):
        refused(model, x, y, "group_size must be an integer", group_size=size)
    refused(model, x, y, "at least one parameter", parameters={})
    stranger = {"w": nn.Parameter(torch.zeros(2))}
    refused(model, x, y, "'w' is no parameter of the model", parameters=stranger)
    refused(model, x, y[:5], "one label for each, got 13 inputs and 5 labels")
    refused(model, x[:0], y[:0], "at least one sample")
    refused(model, x, y - 9, r"labels must lie in \[0, 5\)")
    refused(model, x, y + 5, r"labels must lie in \[0, 5\)")
    refused(model, x * float("nan"), y, "loss must be finite, got nan for sample 0")
    with pytest.raises(fp.FisherpruneError, match="batches must hold samples"):
        fp.gradient_moments(model, [])
    with pytest.raises(fp.FisherpruneError, match="batch 1 is Tensor"):
        fp.gradient_moments(model, [(x, y), x])


def test_bad_parameters():
    x, y = data((3, 9, 9))
    model = conv_net()
    model[3].weight.requires_grad_(False)
    refused(model, x, y, r"'3.weight' is frozen \(requires_grad=False\)")
    for dtype in (torch.float64, torch.bfloat16, torch.complex64):
        refused(conv_net().to(dtype), x, y, f"must be float32, got {dtype}")


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
