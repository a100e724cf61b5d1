"""Models that call kinds of layers, and the ways that their parameters must go."""

import torch
import torch.nn.functional as F
from nets import Own
from torch import nn

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


def attention(forward, **options):
    return read(forward, a=nn.MultiheadAttention(8, 2, **options))


LAYERS = {
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
}
"""Calls of the kinds of layers that torch has: as WAYS."""
