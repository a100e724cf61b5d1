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
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    last = x.to(memory_format=torch.channels_last)
    strided = torch.randn(13, 9, 9, 6)[..., ::2].permute(0, 3, 2, 1).copy_(x)
    for inputs in (last, strided):
        assert_moments(fp.gradient_moments(model, batches(inputs, y, 5)), expected)
    model.to(memory_format=torch.channels_last)
    assert_moments(fp.gradient_moments(model, batches(last, y, 5)), expected)


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


class LongAlone(Mixing):
    """A layer that only long sequences pass; inputs [N, T, 4]."""

    def forward(self, x):
        return self.head((self.fc(x) if x.shape[1] > 3 else x).mean(1))


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "sizes",
    [[(5, 5), (5, 2), (5, 5)], [(3, 5), (4, 2), (4, 5)], [(3, 5), (1, 2), (4, 5)]]
    + [[(2, 2), (3, 5), (1, 2)], [(5, 5), (5, 2)], [(3, 5), (1, 2), (1, 2), (1, 2)]],
)
def test_a_parameter_that_some_batches_do_not_use(sizes, group_size):
    model = LongAlone(None)
    data = [(torch.randn(n, t, 4), torch.randint(5, (n,))) for n, t in sizes]
    parameters = dict(model.named_parameters())
    expected = truth.moments_of_batches(model, data, parameters, group_size)
    found = fp.gradient_moments(
        model, data, group_size=group_size, parameters=parameters
    )
    assert_moments(found, expected)


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


class Recurrent(nn.Module):
    """Uses a convolution and a Linear layer many times; inputs [N, 3, 5, 5]."""

    def __init__(self, uses, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, groups=groups)
        self.fc, self.head, self.uses = nn.Linear(3, 3), nn.Linear(3, 5), uses

    def forward(self, x):
        for _ in range(self.uses):
            x = torch.tanh(self.conv(x))
        x = x.mean((2, 3))
        for _ in range(self.uses):
            x = torch.tanh(self.fc(x))
        return self.head(x)


@pytest.mark.parametrize("joined_bytes", [1, 32 << 20])
@pytest.mark.parametrize("uses, groups, group_size", [(3, 1, 1), (5, 3, 2), (4, 1, 13)])
def test_many_uses_of_a_layer(uses, groups, group_size, joined_bytes, monkeypatch):
    # By the smaller number of bytes, every group is joined by itself.
    monkeypatch.setattr("fisherprune.persample.factors.STREAM_BYTES", joined_bytes)
    model, (x, y) = Recurrent(uses, groups), data((3, 5, 5))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, group_size)
    for size in (5, 13):
        found = fp.gradient_moments(
            model, batches(x, y, size), group_size=group_size, parameters=parameters
        )
        assert_moments(found, expected)


class Strided(nn.Module):
    """Uses convolutions of any geometry several times; inputs [N, 4, 9, 8]."""

    def __init__(self, kernel, one_dimensional=False, **options):
        super().__init__()
        self.rows = one_dimensional
        kind = nn.Conv1d if one_dimensional else nn.Conv2d
        self.conv = kind(4, 6, kernel, **options)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = x.flatten(2) if self.rows else x
        seen = [torch.tanh(self.conv(x * scale)) for scale in (1.0, -0.7, 0.4)]
        return self.head(sum(h.flatten(2).square().sum(2) for h in seen))


GEOMETRIES = [
    {"kernel": 3, "stride": 2, "padding": 1},
    {"kernel": (4, 2), "stride": (3, 1), "padding": (2, 0), "groups": 2},
    {"kernel": (2, 3), "stride": (3, 2), "dilation": (3, 2), "padding": (0, 2)},
    {"kernel": (1, 1), "stride": (2, 2)},
    {"kernel": (9, 8)},
    {"kernel": (3, 3), "stride": (5, 4), "padding": (3, 1), "groups": 2},
    {"kernel": 5, "one_dimensional": True, "stride": 3, "padding": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("group_size", [1, 4])
def test_three_uses_of_a_convolution_of_any_geometry(geometry, group_size):
    model, (x, y) = Strided(**geometry), data((4, 9, 8))
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, group_size)
    found = fp.gradient_moments(
        model, [(x, y)], group_size=group_size, parameters=parameters
    )
    assert_moments(found, expected)


def test_many_uses_of_a_convolution_are_not_unfolded(monkeypatch):
    def unfold(*_, **__):
        raise AssertionError("patches were made")

    monkeypatch.setattr(nn.functional, "unfold", unfold)
    model, (x, y) = Recurrent(20), data((3, 5, 5))
    fp.gradient_moments(model, [(x, y)])
