"""Parameters in calls of any function: against a loop over single samples."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments, refused
from nets import Own, batches, data
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fisherprune as fp

TOKENS = 7, 8
"""Positions and features of a sample."""


def drawn(*shape):
    return nn.Parameter(torch.randn(shape))


def read(forward, width=8, **parts):
    """Return a module that classifies what ``forward`` makes of ``[N, T, 8]``."""
    return Own(lambda m, x: m.head(forward(m, x)), head=nn.Linear(width, 5), **parts)


def looked_up(forward, **parts):
    """Return a module that looks 11 tokens up."""
    table = parts.pop("table", nn.Embedding(11, 8))
    tokens = lambda x: (x.abs().sum(2) * 3).long() % 11  # noqa: E731
    return read(lambda m, x: forward(m, tokens(x)), table=table, **parts)


def changed(h, bias):
    h += bias
    return h


def query_key(m, x):
    offsets = torch.arange(7)[:, None] - torch.arange(7) + 6
    bias = m.bias[offsets.flatten()].view(7, 7)
    return ((x @ x.mT + bias).softmax(-1) @ x).mean(1)


def attention(forward, **options):
    return read(forward, a=nn.MultiheadAttention(8, 2, **options))


def with_token(m, x, token):
    """Add a token and positions to the sequence; read the token."""
    return torch.tanh(m.fc(torch.cat([token, x], 1) + m.positions[:, :8]))[:, 0]


TOKEN = {"token": (1, 1, 8), "positions": (1, 9, 8)}

WAYS = {
    # what it is: the model, and a parameter with the ways that it must go
    "linear over positions first": (
        lambda: read(
            lambda m, x: m.fc(x.transpose(0, 1)).tanh().mean(0), fc=nn.Linear(8, 8)
        ),
        {"fc.weight": ("linear",), "fc.bias": ("linear",)},
    ),
    "linear over rows, samples first": (
        lambda: read(
            lambda m, x: m.fc(x.flatten(0, 1)).tanh().unflatten(0, (-1, 7)).mean(1),
            fc=nn.Linear(8, 8),
        ),
        {"fc.weight": ("linear",), "fc.bias": ("linear",)},
    ),
    "linear over rows, positions first": (
        lambda: read(
            lambda m, x: (
                m.fc(x.transpose(0, 1).flatten(0, 1))
                .tanh()
                .unflatten(0, (7, -1))
                .mean(0)
            ),
            fc=nn.Linear(8, 8),
        ),
        {"fc.weight": ("linear",), "fc.bias": ("linear",)},
    ),
    "linear over positions as features": (
        lambda: read(lambda m, x: m.fc(x.mT).tanh().mean(1), fc=nn.Linear(7, 8)),
        {"fc.weight": ("linear",)},
    ),
    "convolution of frames": (
        lambda: read(
            lambda m, x: (
                m.norm(m.conv(x.flatten(0, 1).view(-1, 2, 2, 2)))
                .tanh()
                .unflatten(0, (-1, 7))
                .mean((1, 3, 4))
            ),
            conv=nn.Conv2d(2, 8, 2, padding=1),
            norm=nn.BatchNorm2d(8),
        ),
        {"conv.weight": ("conv2d",), "norm.weight": ("batch_norm",)},
    ),
    "convolution of frames, frames first": (
        lambda: read(
            lambda m, x: (
                m.norm(m.conv(x.transpose(0, 1).flatten(0, 1).view(-1, 2, 4)))
                .tanh()
                .unflatten(0, (7, -1))
                .mean((0, 3))
            ),
            conv=nn.Conv1d(2, 8, 2),
            norm=nn.GroupNorm(2, 8),
        ),
        {"conv.weight": ("conv1d",), "norm.bias": ("group_norm",)},
    ),
    "layer norm": (
        lambda: read(
            lambda m, x: m.both(m.norm(x)).tanh().mean(1),
            norm=nn.LayerNorm(8),
            both=nn.LayerNorm(TOKENS),
        ),
        {"norm.weight": ("layer_norm",), "both.bias": ("layer_norm",)},
    ),
    "rms norm": (
        lambda: read(lambda m, x: m.norm(x).tanh().mean(1), norm=nn.RMSNorm(8)),
        {"norm.weight": ("rms_norm",)},
    ),
    "instance norm": (
        lambda: read(
            lambda m, x: m.norm(x.mT).tanh().mean(2),
            norm=nn.InstanceNorm1d(8, affine=True),
        ),
        {"norm.weight": ("instance_norm",), "norm.bias": ("instance_norm",)},
    ),
    "prelu": (
        lambda: read(
            lambda m, x: m.each(m.one(x).mT).mean(2), one=nn.PReLU(), each=nn.PReLU(8)
        ),
        {"one.weight": ("prelu",), "each.weight": ("prelu",)},
    ),
    "embedding": (
        lambda: looked_up(
            lambda m, x: m.table(x).tanh().mean(1),
            table=nn.Embedding(11, 8, padding_idx=2),
        ),
        {"table.weight": ("embedding",)},
    ),
    "embedding and head tied": (
        lambda: Own(
            lambda m, x: F.linear(
                torch.tanh(m.fc(m.table((x.abs().sum(2) * 3).long() % 11))),
                m.table.weight,
            ).mean(1)[:, :5],
            table=nn.Embedding(11, 8),
            fc=nn.Linear(8, 8),
        ),
        {"table.weight": ("embedding", "linear")},
    ),
    "embedding, positions and head tied, used twice": (
        lambda: Own(
            lambda m, x: F.linear(
                m.table((x.abs().sum(2) * 3).long() % 11)
                + m.table(x[..., 0].long().abs() % 11)
                + m.table.weight[:7],
                m.table.weight,
            ).mean(1)[:, :5],
            table=nn.Embedding(11, 8),
        ),
        {"table.weight": ("embedding", "linear", "add")},
    ),
    **{
        f"bag of embeddings, {mode}": (
            lambda mode=mode: looked_up(
                lambda m, x: m.table(x).tanh(),
                table=nn.EmbeddingBag(11, 8, mode=mode, padding_idx=2),
            ),
            {"table.weight": ("embedding_bag",)},
        )
        for mode in ("mean", "sum", "max")
    },
    "attention": (
        lambda: attention(
            lambda m, x: m.a(x, x, x, need_weights=False)[0].mean(1), batch_first=True
        ),
        {"a.in_proj_weight": ("linear",), "a.out_proj.bias": ("linear",)},
    ),
    "attention over others, positions first": (
        lambda: attention(
            lambda m, x: m.a(
                x.transpose(0, 1)[:5], 2 * x.transpose(0, 1), x.transpose(0, 1)
            )[0].mean(0),
            add_bias_kv=True,
        ),
        {"a.in_proj_weight": ("linear",), "a.in_proj_bias": ("linear",)},
    ),
    "attention with projections of their own": (
        lambda: attention(
            lambda m, x: m.a(x, x[..., :6], x[..., :4])[0].mean(1),
            kdim=6,
            vdim=4,
            batch_first=True,
        ),
        {"a.q_proj_weight": ("linear",), "a.in_proj_bias": ("linear",)},
    ),
    "encoder": (
        lambda: read(
            lambda m, x: m.layers(x).mean(1),
            layers=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2
            ),
        ),
        {"layers.layers.1.norm1.weight": ("layer_norm",)},
    ),
    "encoder and decoder": (
        lambda: read(
            lambda m, x: m.layers(x.transpose(0, 1), x.transpose(0, 1)[:3]).mean(0),
            layers=nn.Transformer(8, 2, 1, 1, 12),
        ),
        {"layers.decoder.layers.0.multihead_attn.in_proj_weight": ("linear",)},
    ),
    "class token, expanded": (
        lambda: read(
            lambda m, x: with_token(m, x, m.token.expand(len(x), -1, -1)),
            fc=nn.Linear(8, 8),
            **{name: drawn(*shape) for name, shape in TOKEN.items()},
        ),
        {"token": ("expand",), "positions": ("add",)},
    ),
    "class token, repeated": (
        lambda: read(
            lambda m, x: with_token(m, x, m.token.repeat(len(x), 1, 1)),
            fc=nn.Linear(8, 8),
            **{name: drawn(*shape) for name, shape in TOKEN.items()},
        ),
        {"token": ("vmap",), "positions": ("add",)},
    ),
    "state that all samples begin with": (
        lambda: read(
            lambda m, x: m.fc(x[:, 0] + m.again(m.state.expand(len(x), 8))).tanh(),
            fc=nn.Linear(8, 8),
            again=nn.Linear(8, 8),
            state=drawn(8),
        ),
        {"again.weight": ("linear",), "state": ("expand",)},
    ),
    "scales, offsets, temperature": (
        lambda: read(
            lambda m, x: (
                (m.scale * torch.tanh(x) * m.heat.exp() / m.by - m.less) + (m.more - x)
            ).mean(1),
            scale=drawn(8),
            heat=drawn(),
            by=drawn(7, 1),
            less=drawn(1, 8),
            more=drawn(7, 1),
        ),
        {"scale": ("mul",), "less": ("sub",), "heat": ("mul",), "more": ("sub",)},
    ),
    "added in place": (
        lambda: read(
            lambda m, x: changed(m.fc(x), m.bias).tanh().mean(1),
            fc=nn.Linear(8, 8),
            bias=drawn(8),
        ),
        {"bias": ("add",), "fc.weight": ("linear",)},
    ),
    "written in place": (
        lambda: read(lambda m, x: x.clone().mul_(m.scale).mean(1), scale=drawn(8)),
        {"scale": ("mul",)},
    ),
    "powers": (
        lambda: read(lambda m, x: (x.abs() ** m.power.abs()).mean(1), power=drawn(8)),
        {"power": ("vmap",)},
    ),
    "relative positions": (lambda: read(query_key, bias=drawn(13)), {}),
    "position bias that a network makes": (
        lambda: read(
            lambda m, x: (x + m.net(torch.linspace(0, 1, 7).to(x)[:, None])).mean(1),
            net=nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 8)),
        ),
        {"net.0.weight": ("add",)},
    ),
    "einsum": (
        lambda: read(
            lambda m, x: torch.einsum("ntd,dke->nke", x, m.w).tanh().mean(1),
            w=drawn(8, 2, 8),
        ),
        {"w": ("vmap",)},
    ),
    "products": (
        lambda: read(
            lambda m, x: (
                torch.addmm(m.bias, (x @ m.w).tanh().flatten(0, 1), m.v)
                .unflatten(0, (-1, 7))
                .mean(1)
            ),
            w=drawn(8, 6),
            v=drawn(6, 8),
            bias=drawn(8),
        ),
        {"w": ("matmul",), "v": ("addmm",), "bias": ("addmm",)},
    ),
    "bilinear": (
        lambda: read(lambda m, x: m.b(x, x.tanh()).mean(1), b=nn.Bilinear(8, 8, 8)),
        {"b.weight": ("vmap",), "b.bias": ("vmap",)},
    ),
    "parts of one weight": (
        lambda: read(
            lambda m, x: sum(F.linear(x, w).tanh() for w in m.w.chunk(3)).mean(1),
            w=drawn(24, 8),
        ),
        {"w": ("linear",)},
    ),
    "overlapping parts, and the whole": (
        lambda: read(
            lambda m, x: (
                (x @ m.w[:8]).tanh()
                + (x @ m.w[4:]).tanh()
                + (x @ m.w.T[:, 2:10]).tanh()
            ).mean(1),
            w=drawn(12, 8),
        ),
        {"w": ("matmul",)},
    ),
    "weight norm": (
        lambda: read(
            lambda m, x: m.fc(x).tanh().mean(1), fc=weight_norm(nn.Linear(8, 8))
        ),
        {"fc.parametrizations.weight.original0": ("linear",)},
    ),
    "cosines": (
        lambda: read(
            lambda m, x: F.linear(F.normalize(x.mean(1)), F.normalize(m.w)) * m.s.exp(),
            w=drawn(8, 8),
            s=drawn(),
        ),
        {"w": ("linear",), "s": ("mul",)},
    ),
    "ones for each sample": (
        lambda: read(
            lambda m, x: (
                x.mean(1) * m.shift + torch.ones_like(x[:, 0]) * m.scale * m.shift
            ),
            scale=drawn(),
            shift=drawn(8),
        ),
        {"scale": ("mul",), "shift": ("mul",)},
    ),
    "group norm of vectors": (
        lambda: read(
            lambda m, x: m.norm(x.flatten(0, 1)).tanh().unflatten(0, (-1, 7)).mean(1),
            norm=nn.GroupNorm(2, 8),
        ),
        {"norm.weight": ("group_norm",)},
    ),
    "complex numbers": (
        lambda: read(
            lambda m, x: (
                (
                    x.to(torch.promote_types(x.dtype, torch.complex64))
                    @ torch.complex(m.real, m.imaginary)
                )
                .abs()
                .mean(1)
            ),
            real=drawn(8, 8),
            imaginary=drawn(8, 8),
        ),
        {"real": ("loop",), "head.weight": ("linear",)},
    ),
    "a transform of torch.func": (
        lambda: read(
            lambda m, x: torch.func.vmap(lambda row: m.fc(row).tanh().mean(0))(x),
            fc=nn.Linear(8, 8),
        ),
        {"fc.weight": ("loop",), "head.weight": ("linear",)},
    ),
    "set at an index": (
        lambda: read(lambda m, x: written(x, m.row).tanh().mean(1), row=drawn(8)),
        {"row": ("vmap",)},
    ),
    "each sample by itself": (
        lambda: read(
            lambda m, x: torch.stack([m.fc(row).tanh().mean(0) for row in x]),
            fc=nn.Linear(8, 8),
        ),
        {"fc.weight": ("loop",), "head.weight": ("linear",)},
    ),
    "rows split by counts": (
        lambda: read(split, one=nn.Linear(8, 8), two=nn.Linear(8, 8)),
        {"one.weight": ("loop",), "head.weight": ("linear",)},
    ),
    "rows of samples in uneven numbers": (
        lambda: read(routed, one=nn.Linear(8, 8), two=nn.Linear(8, 8)),
        {"one.weight": ("loop",), "head.weight": ("linear",)},
    ),
}


def written(x, row):
    x = x.clone()
    x[:, 3] = row
    return x


def routed(m, x):
    """Send each token to one of two experts."""
    rows = x.flatten(0, 1)
    first = rows[:, 0] > 0
    out = torch.zeros_like(rows)
    out[first], out[~first] = m.one(rows[first]).tanh(), m.two(rows[~first]).tanh()
    return out.unflatten(0, (-1, 7)).mean(1)


def split(m, x):
    """Sort the tokens by expert; each gets a part."""
    rows = x.flatten(0, 1)
    expert = (rows[:, 0] > 0).long()
    order = expert.argsort(stable=True)
    first, second = rows[order].split(torch.bincount(expert, minlength=2).tolist())
    out = torch.cat([m.one(first).tanh(), m.two(second).tanh()])
    return out[order.argsort()].unflatten(0, (-1, 7)).mean(1)


def moments_of(model, x, y, size, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.FisherpruneWarning)
        return fp.gradient_moments(model, batches(x, y, size), **options)


@pytest.mark.parametrize("group_size, size", [(1, 5), (3, 4), (2, 1)])
@pytest.mark.parametrize("what", WAYS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_moments(what, group_size, size):
    make, ways = WAYS[what]
    model, (x, y) = make().eval(), data(TOKENS)
    named = dict(model.named_parameters())
    options = {"group_size": group_size, "parameters": named}
    expected = truth.moments(model, x, y, named, group_size)
    found = moments_of(model, x, y, size, **options)
    known = {n: e for n, e in expected.items() if float(e[1].norm()) > 1e-14}
    assert len(known) >= len(expected) - 1  # the bias of keys has no gradient
    assert_moments(found, known)
    if size == 5:
        assert {n: set(found.paths[n]) for n in ways} == {
            n: set(way) for n, way in ways.items()
        }


@pytest.mark.parametrize("what", ["class token, expanded", "attention", "weight norm"])
def test_the_gauss_newton_diagonal(what):
    model, (x, y) = WAYS[what][0]().eval(), data(TOKENS)
    named = dict(model.named_parameters())
    found = fp.gauss_newton_diagonal(model, batches(x, y, 5), parameters=named)
    for name, wanted in truth.gauss_newton_diagonal(model, x, named).items():
        if float(wanted.norm()) > 1e-14:
            assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_the_gauss_newton_diagonal_of_samples_that_run_alone():
    model, (x, y) = WAYS["each sample by itself"][0](), data(TOKENS)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="'fc.bias' .linear: "):
        found = fp.gauss_newton_diagonal(model, batches(x, y, 5), parameters=named)
    for name, wanted in truth.gauss_newton_diagonal(model, x, named).items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_what_is_seen_late_runs_alone_from_then_on():
    def forward(m, x):
        h = m.fc(x).tanh() if len(x) > 3 else torch.stack([m.fc(r).tanh() for r in x])
        return h.mean(1)

    model, (x, y) = read(forward, fc=nn.Linear(8, 8)), data(TOKENS)
    named = dict(model.named_parameters())
    expected = truth.moments(model, x, y, named, 4)
    given = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    with pytest.warns(fp.FisherpruneWarning, match="'fc.bias' .linear"):
        found = fp.gradient_moments(model, given, group_size=4, parameters=named)
    assert_moments(found, expected)
    assert found.paths["fc.weight"] == ("loop",)


def test_sequences_of_several_lengths():
    model = read(
        lambda m, x: m.fc(x.transpose(0, 1)).tanh().mean(0), fc=nn.Linear(8, 8)
    )
    named = dict(model.named_parameters())
    given = [
        (torch.randn(n, t, 8), torch.randint(5, (n,)))
        for n, t in ((4, 7), (1, 5), (3, 9), (5, 7), (2, 2))
    ]
    expected = truth.moments_of_batches(model, given, [*named], 3)
    found = fp.gradient_moments(model, given, group_size=3, parameters=named)
    assert_moments(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype(dtype):
    parts = {"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "scale": drawn(8)}
    model = read(lambda m, x: m.scale * m.norm(m.fc(x)).tanh().mean(1), **parts)
    model, (x, y) = model.to(dtype), data(TOKENS)
    named, x = dict(model.named_parameters()), x.to(dtype)
    found = fp.gradient_moments(model, batches(x, y, 5), parameters=named)
    assert all(t.dtype == torch.float32 for t in found.fisher.values())
    expected = truth.moments(model, x, y, named)
    assert_moments(found, expected, 1e-5 if dtype == torch.float64 else 5e-2)
    masks = fp.prune(model, [(x, y)], "fts", 0.5, parameters=named, ties="position")
    for name, mask in masks.items():
        assert torch.equal(named[name] != 0, mask & (named[name] != 0))


def test_models_of_several_dtypes():
    model = read(
        lambda m, x: m.fc(x.bfloat16()).float().tanh().mean(1), fc=nn.Linear(8, 8)
    )
    model.fc.bfloat16()
    (x, y), named = data(TOKENS), dict(model.named_parameters())
    found = fp.gradient_moments(model, [(x, y)], parameters=named)
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(named.values())))
    for name, column in zip(named, zip(*rows, strict=True), strict=True):
        expected = torch.stack(column).double().square().mean(0)
        assert truth.relative_error(found.fisher[name], expected) < 3e-2, name


def test_autocast():
    model, (x, y) = WAYS["class token, repeated"][0](), data(TOKENS)
    named = dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = fp.gradient_moments(model, batches(x, y, 5), parameters=named)
    assert_moments(found, truth.moments(model, x, y, named), 5e-2)


def test_what_is_computed_in_place_from_a_parameter_after_its_use():
    def forward(m, x):
        scale = m.scale * 2
        h = x * scale
        scale.add_(1)
        return (h + scale).mean(1)

    model, (x, y) = read(forward, scale=drawn(8)), data(TOKENS)
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="'scale' .what is computed from it"):
        found = fp.gradient_moments(model, [(x, y)], parameters=named)
    assert_moments(found, truth.moments(model, x, y, named))


def test_an_embedding_whose_gradient_is_scaled_by_frequency():
    model = looked_up(
        lambda m, x: m.table(x).tanh().mean(1),
        table=nn.Embedding(11, 8, scale_grad_by_freq=True),
    )
    (x, y), weight = data(TOKENS), model.table.weight
    pairs = zip(x.split(1), y.split(1), strict=True)
    losses = [F.cross_entropy(model(one), label) for one, label in pairs]
    rows = torch.stack(
        [torch.autograd.grad(loss, weight)[0].double() for loss in losses]
    )
    found = fp.gradient_moments(model, batches(x, y, 5), parameters={"w": weight})
    assert_moments(found, {"w": (rows.mean(0), rows.square().mean(0))})


def test_samples_that_all_are_reduced_to():
    model = read(lambda m, x: (x * (m.scale * x.mean())).mean(1), scale=drawn(8))
    x, y = data(TOKENS)
    refused(model, x, y, "samples mix", parameters={"scale": model.scale})


@pytest.mark.parametrize("what", ["rows split by counts", "rows of samples in uneven"])
def test_uneven_rows_whose_total_is_even(what):
    """Of three samples: then rows look as if each sample had as many as the last."""
    (make, _), even = next(w for name, w in WAYS.items() if what in name), 0
    while even < 4:
        model, (x, y) = make(), data(TOKENS, samples=3)
        first = (x[..., 0] > 0).sum(1)
        if first.sum() != 3 * first[2] or first[0] == first[1]:
            continue
        even += 1
        named = dict(model.named_parameters())
        found = moments_of(model, x, y, 3, parameters=named)
        assert_moments(found, truth.moments(model, x, y, named))
