"""Volume convolutions and transposed ones of random sizes, and whole models of them."""

import math
from random import choice, randint

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments, refused
from nets import batches, data, randomized
from torch import nn

import fisherprune as fp
from fisherprune.persample import volumes
from fisherprune.persample.volumes import Volume, VolumeFactors

TRANSPOSED = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
KINDS = ["Conv3d", *TRANSPOSED]


def drawn(kind, **fixed):
    """Draw a layer and the shape of its inputs, without samples."""
    dims, groups = int(kind[-2]), randint(1, 4)

    def draw(least, most):
        return [randint(least, most) for _ in range(dims)]

    sizes = dict(kernel_size=draw(1, 3), stride=draw(1, 3), dilation=draw(1, 3))
    sizes |= dict(padding=draw(0, 2), groups=groups, bias=choice([True, False]))
    if kind in TRANSPOSED:
        most = zip(sizes["stride"], sizes["dilation"], strict=True)
        sizes["output_padding"] = [randint(0, max(pair) - 1) for pair in most]
    sizes |= fixed
    groups = sizes["groups"]
    # The mean of a bias of few numbers may cancel, and its digits with it.
    channels, out = (groups * randint(-(-4 // groups), 4) for _ in range(2))
    layer = getattr(nn, kind)(channels, out, **sizes)
    shape = (channels, *draw(1, 7))
    try:
        fits = layer(torch.zeros(1, *shape)).numel()
    except RuntimeError:  # no output is left, or one below zero
        fits = 0
    return (layer, shape) if fits else drawn(kind, **fixed)


def between(layer, shape, classes=5):
    """Return a classifier with a layer between two that are scored, too."""
    kind, channels = type(layer), shape[0]
    inputs = layer(torch.zeros(1, *shape)).numel()
    return nn.Sequential(
        kind(channels, channels, 1), nn.Tanh(), layer, nn.Tanh(), nn.Flatten(),
        nn.Linear(inputs, classes),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [1, 3, 20])
def test_moments_of_random_layers(kind, group_size):
    for _ in range(6):
        layer, shape = drawn(kind)
        model, (x, y) = between(layer, shape), data(shape)
        parameters = dict(model.named_parameters())
        expected = truth.moments(model, x, y, parameters, group_size)
        options = dict(parameters=parameters, group_size=group_size)
        found = fp.gradient_moments(model, batches(x, y, 5), **options)
        assert_moments(found, expected)
        for name in ("0.weight", "2.weight", "0.bias"):
            alone = dict(parameters={name: parameters[name]}, group_size=group_size)
            found = fp.gradient_moments(model, batches(x, y, 4), **alone)
            assert_moments(found, {name: expected[name]})


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("output_padding", [1, 2, 3, 4])
def test_output_padding_of_a_stride_and_more(dims, output_padding):
    sizes = dict(kernel_size=2, stride=choice([1, 2]), dilation=5, bias=True)
    sizes |= dict(padding=randint(0, 4), output_padding=output_padding)
    layer, shape = drawn(f"ConvTranspose{dims}d", **sizes)
    model, (x, y) = between(layer, shape), data(shape)
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


@pytest.mark.parametrize("padding", ["same", "valid", [1], 2, (0, 1, 2)])
@pytest.mark.parametrize("kernel", [3, (2, 3, 4), (1, 4, 1), (4, 1, 1), 1])
def test_padding_of_conv3d(padding, kernel):
    layer = nn.Conv3d(2, 4, kernel, padding=padding, dilation=(1, 2, 1), groups=2)
    shape = (2, 5, 7, 6)
    model, (x, y) = between(layer, shape), data(shape, samples=7)
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(kind):
    layer, shape = drawn(kind)
    model, (x, y) = between(layer, shape), data(shape)
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters)
    last = {3: torch.channels_last, 4: torch.channels_last_3d}.get(len(shape))
    if last:
        model.to(memory_format=last)
    x = x.contiguous(memory_format=last) if last else x.mT.contiguous().mT
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=parameters)
    assert_moments(found, expected)


class Reused(nn.Module):
    """One layer that is called several times, the outputs as the next inputs."""

    def __init__(self, layer, times, shape):
        super().__init__()
        self.layer, self.times = layer, times
        self.head = nn.Linear(shape[0], 5)

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return self.head(x.flatten(2).sum(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("sizes", ["same", "other"])
def test_a_layer_that_is_called_several_times(kind, times, group_size, sizes):
    size = dict(kernel_size=3, padding=1, stride=1 if sizes == "same" else 2)
    layer = getattr(nn, kind)(4, 4, groups=choice([1, 2, 4]), **size)
    shape = (4, *[randint(2, 4) for _ in range(int(kind[-2]))])
    model, (x, y) = Reused(layer, times, shape), data(shape)
    parameters = dict(model.named_parameters())
    options = dict(parameters=parameters, group_size=group_size)
    found = fp.gradient_moments(model, batches(x, y, 5), **options)
    assert_moments(found, truth.moments(model, x, y, parameters, group_size))


class Tied(nn.Module):
    """An autoencoder whose decoder has the encoder's weight."""

    def __init__(self, dims):
        super().__init__()
        self.down = getattr(nn, f"Conv{dims}d")(2, 6, 3, stride=2, padding=1)
        self.up = getattr(F, f"conv_transpose{dims}d")
        self.head = nn.Linear(2, 5)

    def forward(self, x):
        code = torch.tanh(self.down(x))
        x = self.up(code, self.down.weight, None, 2, 1, output_padding=1)
        return self.head(torch.tanh(x).flatten(2).sum(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("group_size", [1, 4])
def test_a_decoder_with_the_encoders_weight(dims, group_size):
    shape = (2, *[randint(3, 6) for _ in range(dims)])
    model, (x, y) = Tied(dims), data(shape)
    parameters = dict(model.named_parameters())
    options = dict(parameters=parameters, group_size=group_size)
    found = fp.gradient_moments(model, batches(x, y, 5), **options)
    assert_moments(found, truth.moments(model, x, y, parameters, group_size))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bfloat16(kind):
    layer, shape = drawn(kind, kernel_size=3, padding=1)
    model, (x, y) = between(layer, shape), data(shape)
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters)
    # oneDNN's volumes in bfloat16 are wrong on CPUs with AMX: NaN, in torch 2.14.1.
    plain = torch.backends.mkldnn.flags(enabled="3d" not in kind)
    with torch.autocast("cpu", torch.bfloat16), plain:
        found = fp.gradient_moments(model, [(x, y)], parameters=parameters)
    assert_moments(found, expected, tolerance=0.5)
    errors = [
        truth.relative_error(found.mean[n], mean) for n, (mean, _) in expected.items()
    ]
    assert max(errors) > 1e-4  # it did


@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_diagonal(kind):
    layer, shape = drawn(kind)
    model, (x, y) = between(layer, shape), data(shape, samples=6)
    parameters = dict(model.named_parameters())
    found = fp.gauss_newton_diagonal(model, batches(x, y, 4), parameters=parameters)
    for name, wanted in truth.gauss_newton_diagonal(model, x, parameters).items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


@pytest.mark.parametrize("kind", ["Conv3d", "ConvTranspose3d"])
@pytest.mark.parametrize("group_size", [1, 3])
def test_moments_do_not_depend_on_how_many_images_are_made(
    kind, group_size, monkeypatch
):
    layer, shape = drawn(kind, kernel_size=(3, 2, 1), groups=1, bias=True)
    model, (x, y) = between(layer, shape), data(shape)
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters, group_size)
    sample = 4 * (3 * math.prod(shape) + model[2:4](torch.zeros(1, *shape)).numel())
    for size in (1, sample, 2 * sample, 4 * sample):
        monkeypatch.setattr(volumes, "IMAGE_BYTES", size)
        options = dict(parameters=parameters, group_size=group_size)
        assert_moments(fp.gradient_moments(model, [(x, y)], **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_takes_the_samples_for_channels_is_refused(kind):
    layer, shape = getattr(nn, kind)(13, 13, 1), [3] * int(kind[-2])
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(3 ** len(shape), 5))
    x, y = data(shape)
    match = "must run with one sample, .* expected input.* to have 13 channels"
    refused(model, x, y, match, parameters={"0.weight": layer.weight})


def drawn_factors(samples=6):
    """Draw the factors of a conv3d, and return its per-sample gradients in float64."""
    layer, shape = drawn("Conv3d", bias=False)
    x = torch.randn(samples, *shape)
    output = layer(x)
    grad = torch.randn_like(output)
    names = ("stride", "padding", "dilation", "groups")
    conv = {name: getattr(layer, name) for name in names}
    weight = layer.weight.detach().double().requires_grad_()
    rows = [
        torch.autograd.grad(F.conv3d(a, weight, **conv), weight, d)[0]
        for a, d in zip(x.double().split(1), grad.double().split(1), strict=True)
    ]
    use = Volume(x, grad, conv)
    return VolumeFactors((use,), tuple(weight.shape)), torch.stack(rows)


def assert_factors(factors, rows):
    """Compare all that factors tell with per-sample gradients."""
    close = dict(rtol=1e-4, atol=1e-4)
    assert factors.per_sample().dtype == torch.float32
    torch.testing.assert_close(factors.per_sample().double(), rows, **close)
    torch.testing.assert_close(factors.total().double(), rows.sum(0), **close)
    some = slice(len(rows) // 2, None)
    torch.testing.assert_close(
        factors.samples(some).per_sample().double(), rows[some], **close
    )
    group_size = choice([size for size in (1, 2, 3) if len(rows) % size == 0])
    sum, sum_sq = torch.ones(factors.shape), torch.ones(factors.shape)
    factors.add_moments(sum, sum_sq, group_size)
    means = rows.unflatten(0, (-1, group_size)).mean(1)
    torch.testing.assert_close(sum.double(), 1 + means.sum(0), **close)
    torch.testing.assert_close(sum_sq.double(), 1 + means.square().sum(0), **close)


def test_rows_and_merged_samples():
    for _ in range(10):
        factors, rows = drawn_factors()
        assert_factors(factors, rows)
        for k in (2, 3, 6):
            merged = rows.unflatten(0, (-1, k)).sum(1)
            assert_factors(factors.merged(k), merged)
        assert_factors(factors.merged(2).merged(3), rows.sum(0, keepdim=True))
        assert_factors(factors.join([factors.samples(slice(6))]), 2 * rows)
        none = factors.samples(slice(0, 0))
        assert none.per_sample().shape == (0, *factors.shape)


class UNet(nn.Module):
    """Two steps down and two up, by 2x2 transposed convolutions."""

    def __init__(self, classes=3):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.bottom = nn.Conv2d(6, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.join = nn.Conv2d(12, 6, 3, padding=1)
        self.upper = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.joined = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x):
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(F.avg_pool2d(a, 2)))
        x = self.up(torch.tanh(self.bottom(F.avg_pool2d(b, 2))))
        x = torch.tanh(self.join(torch.cat([x, b], 1)))
        return self.head(torch.tanh(self.joined(torch.cat([self.upper(x), a], 1))))


def test_a_u_net():
    model, x = UNet(), torch.randn(7, 2, 8, 12)
    y = torch.randint(3, (7, 8, 12))
    chosen = fp.prunable_parameters(model)
    assert {"up.weight", "upper.weight", "head.weight"} < set(chosen)
    found = fp.gradient_moments(model, batches(x, y, 4), group_size=2)
    assert_moments(found, truth.moments(model, x, y, chosen, 2))


class Block(nn.Module):
    """Space, then time, around a shortcut; a volume of each channel by itself."""

    def __init__(self, channels, more):
        super().__init__()
        self.space = nn.Conv3d(
            channels, more, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False
        )
        self.norm, self.other = nn.BatchNorm3d(more), nn.BatchNorm3d(more)
        self.time = nn.Conv3d(more, more, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False)
        self.each = nn.Conv3d(more, more, 3, padding=1, groups=more)
        self.shortcut = nn.Conv3d(channels, more, 1, 2)

    def forward(self, x):
        h = self.time(torch.tanh(self.norm(self.space(x))))
        return torch.tanh(self.other(self.each(h)) + self.shortcut(x))


def test_a_video_network():
    model = randomized(
        nn.Sequential(
            nn.Conv3d(3, 4, (3, 5, 5), (1, 2, 2), (1, 2, 2)),
            nn.Tanh(),
            Block(4, 6),
            Block(6, 8),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )
    x, y = data((3, 6, 18, 14), samples=7)
    parameters = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches(x, y, 3), parameters=parameters)
    assert_moments(found, truth.moments(model, x, y, parameters))
    masks = fp.prune(model, [(x, y)], "fts", 0.5)
    assert len(masks) == 9 and "6.weight" not in masks
