"""gradient_moments against float64 loops."""

import copy

import pytest
import torch
import truth
from checks import assert_moments
from nets import Mixing, SequenceNet, TwiceNet, batches, conv_net, data
from torch import nn

import fisherprune as fp

NETS = {
    "conv": (conv_net, (3, 9, 9)),
    "sequence": (SequenceNet, (4, 12)),
    "twice": (TwiceNet, (4, 8, 8)),
    "twice_depthwise": (lambda: TwiceNet(groups=4), (4, 8, 8)),
}


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
    named = dict(model.named_parameters())
    expected = truth.moments(model, x, y, named)
    last = x.to(memory_format=torch.channels_last)
    strided = torch.randn(13, 9, 9, 6)[..., ::2].permute(0, 3, 2, 1).copy_(x)
    for inputs in (last, strided):
        found = fp.gradient_moments(model, batches(inputs, y, 5), parameters=named)
        assert_moments(found, expected)
    model.to(memory_format=torch.channels_last)
    found = fp.gradient_moments(model, batches(last, y, 5), parameters=named)
    assert_moments(found, expected)


def test_thread_count_matters_by_rounding_at_most():
    """The kernels' sums are the same bits; torch's own layers may round differently."""
    model, (x, y) = conv_net(), data((3, 9, 9))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_moments(fp.gradient_moments(model, [(x, y)]), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_moments_of_shards_add_up(net, group_size):
    make, shape = NETS[net]
    model, (x, y) = make(), data(shape)
    options = {"parameters": dict(model.named_parameters()), "group_size": group_size}
    first, second, third = (
        fp.gradient_moments(model, batches(x[part], y[part], 4), **options)
        for part in (slice(0, 6), slice(6, 12), slice(12, 13))
    )
    found = first + second + third
    assert (found.samples, found.group_size) == (13, group_size)
    assert found.groups == -(-13 // group_size)
    assert_moments(found, truth.moments(model, x, y, options["parameters"], group_size))
    again = (third + (second + first)).fisher
    for name, fisher in found.fisher.items():
        torch.testing.assert_close(again[name], fisher)


def test_a_partial_group_of_the_left_side_counts_as_one():
    model, (x, y) = conv_net(), data((3, 9, 9))
    names = fp.prunable_parameters(model)
    left, right = (
        fp.gradient_moments(model, [(x[part], y[part])], group_size=4)
        for part in (slice(0, 5), slice(5, 10))
    )
    found = left + right
    assert (found.samples, found.groups) == (10, 4)  # not 3, as of one pass
    one, two = (
        truth.moments(model, x[part], y[part], names, 4)
        for part in (slice(0, 5), slice(5, 10))
    )  # two groups each: the mean over all four is that of both means
    expected = {
        name: tuple((a + b) / 2 for a, b in zip(one[name], two[name], strict=True))
        for name in names
    }
    assert_moments(found, expected)


def test_means_are_the_sums_over_the_groups():
    model, (x, y) = conv_net(), data((3, 9, 9))
    found = fp.gradient_moments(model, [(x, y)], group_size=2)
    for name in found.sum:
        assert torch.equal(found.mean[name], found.sum[name].clone().div_(7))
        assert torch.equal(found.fisher[name], found.sum_sq[name].clone().div_(7))


def test_moments_that_do_not_add_up():
    model, (x, y) = conv_net(), data((3, 9, 9))
    found = fp.gradient_moments(model, [(x, y)])
    other = fp.gradient_moments(model, [(x, y)], group_size=2)
    match = r"group_size must be 1 on both sides of \+, got 2"
    with pytest.raises(fp.FisherpruneError, match=match):
        found + other
    for chosen, match in [
        ({"0.weight": model[0].weight}, r"3.weight must be \[8, 3, 3, 3\] on .*None"),
        ({"0.weight": model[3].weight}, r"0.weight must be \[6, 3, 3, 3\] on .*\[8, 3"),
    ]:
        with pytest.raises(fp.FisherpruneError, match="GradientMoments: " + match):
            found + fp.gradient_moments(model, [(x, y)], parameters=chosen)
    with pytest.raises(TypeError, match="unsupported operand"):
        found + 1


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
        assert truth.relative_error(found.fisher[name], fisher) < 1e-5


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


def test_losses_near_zero_are_no_reason_to_refuse():
    """Of a network that has learned them: they are all rounding."""
    model, (x, _) = Mixing(lambda _, h: h + 1e-6 * len(h)), data((4,))
    y = torch.cat([model(x[i : i + 1]) for i in range(len(x))]).detach()
    found = fp.gradient_moments(model, [(x, y)], nn.functional.mse_loss)
    assert found.samples == len(x)


@pytest.mark.parametrize(
    "samples, size, group_size",
    [
        (200_000, 200_000, 1),
        (200_000, 5000, 1),
        (200_000, 5000, 4),
        (200_000, 100_000, 100_000),
        (200_000, 5000, 100_000),
        (3000, 1, 1),
        (3000, 1, 3000),
    ],
)
def test_equal_samples_do_not_lose_digits(samples, size, group_size):
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[0.10000002]])
    batch = x.expand(size, 1), torch.zeros(size)
    found = fp.gradient_moments(
        model,
        (batch for _ in range(samples // size)),
        lambda o, t: o.sum(),
        group_size=group_size,
        parameters=dict(model.named_parameters()),
    )
    exact = {"weight": (x.double(), x.double().square())}
    assert_moments(found, exact, tolerance=1e-5)
    assert_moments(found + found, exact, tolerance=1e-5)
