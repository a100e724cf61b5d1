"""Models that call any function, and the ways that their parameters must go."""

import torch
import torch.nn.functional as F
from layer_calls import LAYERS, drawn, read
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def changed(h, bias):
    h += bias
    return h


def query_key(m, x):
    offsets = torch.arange(7)[:, None] - torch.arange(7) + 6
    bias = m.bias[offsets.flatten()].view(7, 7)
    return ((x @ x.mT + bias).softmax(-1) @ x).mean(1)


def with_token(m, x, token):
    """Add a token and positions to the sequence; read the token."""
    return torch.tanh(m.fc(torch.cat([token, x], 1) + m.positions[:, :8]))[:, 0]


TOKEN = {"token": (1, 1, 8), "positions": (1, 9, 8)}

FUNCTIONS = {
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
        {"w": ("einsum",)},
    ),
    "einsums of a matrix": (
        lambda: read(
            lambda m, x: (
                torch.einsum("nti,io->nto", x, m.a).tanh()
                + torch.einsum("oi, nti -> nto", m.b, x.tanh()).tanh()
                + torch.einsum("ab,nbA->naA", m.c, x).tanh()
                + torch.einsum("tni,io->tno", x.transpose(0, 1), m.a).mean(0)[:, None]
            ).mean(1),
            a=drawn(8, 8),
            b=drawn(8, 8),
            c=drawn(7, 7),
        ),
        dict.fromkeys("abc", ("einsum",)),
    ),
    "einsums of blocks and of several axes": (
        lambda: read(
            lambda m, x: (
                (
                    torch.einsum("nthi,hio->ntho", x.unflatten(2, (2, 4)), m.a).flatten(
                        2
                    )
                    + torch.einsum(
                        "hoi,nthi->ntoh", m.b, x.unflatten(2, (2, 4))
                    ).flatten(2)
                    + torch.einsum(
                        "nthi,hido->ntdo", x.unflatten(2, (2, 4)), m.c
                    ).flatten(2)
                    + torch.einsum("ntd,d->ntd", x, m.d)
                    + torch.einsum("nta,b->ntb", x, m.d)
                )
                .tanh()
                .mean(1)
            ),
            a=drawn(2, 4, 4),
            b=drawn(2, 4, 4),
            c=drawn(2, 4, 4, 2),
            d=drawn(8),
        ),
        dict.fromkeys("abcd", ("einsum",)),
    ),
    "einsums of unnamed axes, and others": (
        lambda: read(
            lambda m, x: (
                torch.einsum("...i,io->...o", x, m.a).tanh()
                + torch.einsum("i...,io->...o", x.movedim(2, 0), m.b).tanh()
                + torch.einsum("nti,io", x, m.b).mT
                + torch.einsum("nti,oip->nto", x, m.c).tanh()
                + torch.einsum("nti,tii->nti", x, m.e).tanh()
                + torch.einsum("nti,iod->ntdo", x[..., :1], m.f).flatten(2)
                + torch.einsum("nti,ij,jo->nto", x, m.a, m.b)
            ).mean(1),
            a=drawn(8, 8),
            b=drawn(8, 8),
            c=drawn(8, 8, 3),
            e=drawn(7, 8, 8),
            f=drawn(8, 4, 2),
        ),
        dict.fromkeys("abcef", ("einsum",)),
    ),
    "dot products of axes": (
        lambda: read(
            lambda m, x: (
                torch.tensordot(x, m.a, 1).tanh()
                + torch.tensordot(m.b, x, ([1], [2])).permute(1, 2, 0).tanh()
                + torch.tensordot(x.unflatten(2, (2, 4)), m.c, dims=2)
                + torch.tensordot(x, m.d, ([2], [1])).tanh().mean((2, 3))[..., None]
                + torch.tensordot(x, m.e, ((1, 2), (0, 1)))[:, None]
                + torch.tensordot(x, m.f, ([2, 1], [0, 1]))[:, None]
                + torch.tensordot(x.movedim(0, 1), m.a, ([-1], [0])).mean(0)[:, None]
                + torch.tensordot(x, m.a[0], 0).mean(-1)
            ).mean(1),
            a=drawn(8, 8),
            b=drawn(8, 8),
            c=drawn(2, 4, 8),
            d=drawn(2, 8, 3),
            e=drawn(7, 8, 8),
            f=drawn(8, 7, 8),
        ),
        dict.fromkeys("abcdef", ("tensordot",)),
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
    "products with blocks": (
        lambda: read(
            lambda m, x: (
                ((x.unsqueeze(1) @ m.w).tanh() @ m.v).sum(1).tanh() @ m.single
                + (x.unflatten(2, (2, 4)).transpose(1, 2) @ m.halves).tanh().sum(1)
            ).mean(1),
            w=drawn(3, 8, 6),
            v=drawn(3, 6, 8),
            single=drawn(1, 8, 8),
            halves=drawn(2, 4, 8),
        ),
        dict.fromkeys(("w", "v", "single", "halves"), ("matmul",)),
    ),
    "kinds and shapes of a weight": (
        lambda: read(
            lambda m, x: (
                (x.to(m.w).type_as(m.w) @ m.w).tanh().mean(1)
                + x[:, 0] * m.w.new_ones(8) * torch.ones_like(m.w[0])
            ),
            w=drawn(8, 8),
        ),
        {"w": ("matmul",)},
    ),
    "products with a weight in front": (
        lambda: read(
            lambda m, x: (
                (m.w @ x.tanh()).tanh().mean(1)
                + (m.v @ x.unflatten(2, (4, 2)).tanh()).flatten(2).mean(1)
                + (m.u @ x.mean(1).mT).mT
            ),
            w=drawn(5, 7),
            v=drawn(4, 4),
            u=drawn(8, 8),
        ),
        {"w": ("matmul",), "v": ("matmul",)},
    ),
    "experts, and other uses of them": (
        lambda: read(
            lambda m, x: (
                torch.bmm(x.flatten(0, 1).expand(3, -1, -1), m.w)
                .tanh()
                .unflatten(1, (-1, 7))
                .sum((0, 2))
                + torch.bmm(x.transpose(0, 1)[:3], m.w).tanh().sum(0)
                + (x.mean(1) * m.w.square().mean((0, 2)))
            ),
            w=drawn(3, 8, 8),
        ),
        {"w": ("bmm", "mul")},
    ),
    "linear layers by other functions": (
        lambda: read(
            lambda m, x: (
                torch.inner(x, m.a).tanh()
                + x.transpose(0, 1).inner(m.a).transpose(0, 1)
                + torch.einsum("...i, oi -> ...o", x, m.b).tanh()
                + torch.einsum("nti,io->nto", x[..., :1], m.b)
                + torch.tensordot(x, m.c, ([2], [1])).tanh()
                + torch.tensordot(x[..., :1], m.c, ([-1], [-1]))
            ).mean(1),
            a=drawn(8, 8),
            b=drawn(8, 8),
            c=drawn(8, 8),
        ),
        {"a": ("inner",), "b": ("einsum",), "c": ("tensordot",)},
    ),
    "inner products with one row": (
        lambda: read(
            lambda m, x: x.mean(1) * torch.inner(x, m.w).tanh().sum(1, keepdim=True),
            w=drawn(8),
        ),
        {"w": ("vmap",)},
    ),
    "distances, which vmap can't run with copies": (
        lambda: read(lambda m, x: torch.cdist(x, m.w).tanh().mean(1), 6, w=drawn(6, 8)),
        {"w": ("vmap",)},
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
        {"fc.weight": ("linear",), "head.weight": ("linear",)},
    ),
    "rows split by counts": (
        lambda: read(split, one=nn.Linear(8, 8), two=nn.Linear(8, 8)),
        {"one.weight": ("linear",), "head.weight": ("linear",)},
    ),
    "rows of samples in uneven numbers": (
        lambda: read(routed, one=nn.Linear(8, 8), two=nn.Linear(8, 8)),
        {"one.weight": ("linear",), "head.weight": ("linear",)},
    ),
}

WAYS = LAYERS | FUNCTIONS
"""What is called: what makes the model, and a parameter with its ways."""


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
