"""Random networks of all kinds of layers, against a loop over single samples."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import truth
from hypothesis import given, settings
from nets import randomized
from torch import nn

import fisherprune as fp

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, TOKENS = 4, 7


class Network(nn.Module):
    """Steps from ``[N, T, D]`` to ``[N, T, D]``, then a head of the mean."""

    def __init__(self, length, width):
        super().__init__()
        self.parts, self.own = nn.ModuleList(), nn.ParameterList()
        self.steps, self.length, self.width = [], length, width

    def part(self, module):
        self.parts.append(module)
        return module

    def drawn(self, *shape):
        self.own.append(nn.Parameter(torch.randn(shape)))
        return self.own[-1]

    def close(self):
        self.head = nn.Linear(self.width, CLASSES)
        return randomized(self).double().eval()  # else rounding errors grow in some

    def forward(self, x, tokens):
        for step in self.steps:
            x = step(self, x, tokens)
        return self.head(torch.tanh(x).mean(1))


def indexed(network, module):
    """Add a module; return its place, which copies of the network have, too."""
    network.part(module)
    return len(network.parts) - 1


def owned(network, *shape):
    network.drawn(*shape)
    return len(network.own) - 1


def linear(draw, net):
    i = indexed(net, nn.Linear(net.width, net.width, bias=draw(st.booleans())))
    fold = draw(st.sampled_from(FOLDS))
    return lambda m, x, _: fold(m.parts[i], x)


def of_rows(layer, x):
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def positions_first(layer, x):
    return layer(x.transpose(0, 1)).transpose(0, 1)


def of_rows_positions_first(layer, x):
    return of_rows(layer, x.transpose(0, 1)).transpose(0, 1)


def whole(layer, x):
    return layer(x)


FOLDS = [whole, of_rows, positions_first, of_rows_positions_first]


def over_positions(draw, net):
    i = indexed(net, nn.Linear(net.length, net.length))
    return lambda m, x, _: m.parts[i](x.mT).mT


def reused(draw, net):
    i = indexed(net, nn.Linear(net.width, net.width))
    fold, other = (draw(st.sampled_from(FOLDS)) for _ in range(2))
    between = draw(st.sampled_from([torch.tanh, F.gelu]))
    return lambda m, x, _: other(m.parts[i], between(fold(m.parts[i], x)))


def tied(draw, net):
    """Look tokens up in a table, and score with it."""
    i = indexed(net, nn.Embedding(TOKENS, net.width))

    def step(m, x, tokens):
        h = torch.tanh(x + m.parts[i](tokens).mean(1, keepdim=True))
        return torch.tanh(F.linear(h, m.parts[i].weight)) @ m.parts[i].weight

    return step


def embedding(draw, net):
    i = indexed(net, nn.Embedding(TOKENS, net.width, padding_idx=1))
    return lambda m, x, tokens: x + m.parts[i](tokens).mean(1, keepdim=True)


def normalized(draw, net):
    width = net.width
    over_features = draw(st.booleans())
    kinds = (
        [nn.LayerNorm(width), nn.RMSNorm(width)]
        if over_features
        else [nn.GroupNorm(2, width), nn.BatchNorm1d(width)]
    )
    i = indexed(net, draw(st.sampled_from(kinds)))
    return lambda m, x, _: m.parts[i](x) if over_features else m.parts[i](x.mT).mT


def convolution(draw, net):
    """Convolve over positions: in one, two or three dimensions, transposed or not."""
    dims = draw(st.integers(1, 3))
    transposed = "Transpose" if draw(st.booleans()) else ""
    kind = getattr(nn, f"Conv{transposed}{dims}d")
    groups = draw(st.sampled_from([1, 2]))
    i = indexed(net, kind(net.width, net.width, 3, padding=1, groups=groups))

    def step(m, x, _):
        image = x.mT.unflatten(2, (-1, *[1] * (dims - 1)))
        return m.parts[i](image).flatten(2).mT

    return step


def framewise(draw, net):
    """Convolve each position's features as an image of its own."""
    i = indexed(net, nn.Conv1d(1, 2, 3, padding=1))
    fold = draw(st.sampled_from([of_rows, of_rows_positions_first]))
    return lambda m, x, _: fold(lambda r: m.parts[i](r.unsqueeze(1)).sum(1), x)


def attention(draw, net):
    first = draw(st.booleans())
    i = indexed(net, nn.MultiheadAttention(net.width, 2, batch_first=first))

    def step(m, x, _):
        x = x if first else x.transpose(0, 1)
        out = m.parts[i](x, x, torch.tanh(x), need_weights=False)[0]
        return out if first else out.transpose(0, 1)

    return step


def recurrent(draw, net):
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    layers = draw(st.integers(1, 2))
    i = indexed(net, kind(net.width, net.width, layers, batch_first=True))
    return lambda m, x, _: m.parts[i](x)[0]


def prelu(draw, net):
    i = indexed(net, nn.PReLU(draw(st.sampled_from([1, net.width]))))
    return lambda m, x, _: m.parts[i](x.mT).mT


def scaled(draw, net):
    shape = draw(st.sampled_from([(), (net.width,), (net.length, 1), (1, net.width)]))
    i = owned(net, *shape)
    how = draw(st.sampled_from([torch.mul, torch.add, torch.sub, lambda x, p: p - x]))
    return lambda m, x, _: how(x, m.own[i])


def token(draw, net):
    """Put a token in front; positions are added to all."""
    i, j = owned(net, 1, 1, net.width), owned(net, net.length + 1, net.width)
    net.length += 1
    return lambda m, x, _: torch.cat([m.own[i].expand(len(x), -1, -1), x], 1) + m.own[j]


def multiplied(draw, net):
    i = owned(net, net.width, net.width)
    how = draw(
        st.sampled_from(
            [
                lambda x, w: x @ w,
                lambda x, w: torch.einsum("ntd,de->nte", x, w),
                lambda x, w: F.linear(x, w[:, : x.shape[2]].T.contiguous()),
            ]
        )
    )
    return lambda m, x, _: how(x, m.own[i])


def residual(draw, net):
    inner = draw(st.sampled_from(SAME))(draw, net)
    return lambda m, x, tokens: x + torch.tanh(inner(m, x, tokens))


def active(draw, net):
    function = draw(st.sampled_from([torch.tanh, F.gelu, torch.sigmoid]))
    return lambda m, x, _: function(x)


SAME = [
    linear,
    over_positions,
    reused,
    tied,
    embedding,
    normalized,
    convolution,
    framewise,
    attention,
    recurrent,
    prelu,
    scaled,
    multiplied,
    active,
]


@st.composite
def networks(draw):
    net = Network(draw(st.integers(1, 5)), draw(st.sampled_from([4, 6])))
    for kind in draw(st.lists(st.sampled_from([*SAME, residual, token]), max_size=5)):
        net.steps.append(kind(draw, net))
    return net


def losses(model, batch):
    x, tokens, labels = batch
    return F.cross_entropy(model(x, tokens), labels, reduction="none")


@pytest.mark.filterwarnings(
    "error::fisherprune.FisherpruneWarning",  # norms of norms have tiny gradients:
    "ignore:.*so small that float32:fisherprune.FisherpruneWarning",
)
@settings(deadline=None, max_examples=500)
@given(
    networks(),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_moments(model, sizes, group_size, seed):
    torch.manual_seed(seed)
    batches = drawn(model, sizes)
    named = dict(model.close().named_parameters())
    found = fp.gradient_moments(
        model, batches, losses=losses, parameters=named, group_size=group_size
    )
    expected = truth.moments_of_losses(model, batches, [*named], losses, [group_size])
    assert_close(found.mean, {n: m for n, (m, _) in expected[group_size].items()})
    assert_close(found.fisher, {n: f for n, (_, f) in expected[group_size].items()})


@settings(deadline=None, max_examples=30)
@given(networks(), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_moments_in_training(model, sizes):
    batches = drawn(model, sizes)
    named = dict(model.close().named_parameters())
    expected = truth.moments_of_losses(model, batches, [*named], losses, [1])[1]
    with fp.moments(model, parameters=named, reduction="sum") as m:
        for batch in batches:
            losses(model, batch).sum().backward()
    assert_close(m.result().fisher, {n: f for n, (_, f) in expected.items()})
    count = m.result().samples
    gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
    sums = {n: expected[n][0] * count for n in gradients}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, sums[name], rtol=1e-6, atol=1e-9)


def drawn(model, sizes):
    """Return batches for a network."""
    length = model.length - sum(
        step.__qualname__.startswith("token") for step in model.steps
    )
    return [
        (
            torch.randn(n, length, model.width).double(),
            torch.randint(TOKENS, (n, 3)),
            torch.randint(CLASSES, (n,)),
        )
        for n in sizes
    ]


def assert_close(found, expected):
    """Compare, up to the rounding errors of the largest gradient."""
    largest = max(float(tensor.norm()) for tensor in expected.values())
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor).norm())
        assert error <= 1e-5 * float(tensor.norm()) + 1e-6 * largest, name
