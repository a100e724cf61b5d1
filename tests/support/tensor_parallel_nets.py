"""A small transformer, and its splits by tensor parallelism."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

TOKENS, WIDTH, HEAD, CLASSES = 14, 8, 2, 6


class Attention(nn.Module):
    """Attention of as many heads as a rank has columns for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # its gradient would be zero
        self.out = nn.Linear(width, width)

    def heads(self, x):
        return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(each(x)) for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One block, behind an embedding and before a head."""

    def __init__(self, width: int = WIDTH, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = Attention(width), MLP(width)
        self.head = nn.Linear(width, TOKENS if tied else CLASSES, bias=not tied)
        self.tied = tied

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.first(x))
        x = x + self.mlp(self.second(x))
        return self.head(x).mean(1)


def transformer(seed: int, tied: bool = False) -> Block:
    """Return the network, the same on all ranks."""
    torch.manual_seed(seed)
    net = Block(tied=tied)
    for p in net.parameters():
        if p.dim() == 1:  # norms of ones and biases of zeros show little
            nn.init.normal_(p, mean=1.0, std=0.3)
    if tied:
        net.head.weight = net.embed.weight
    return net


COLUMNS, ROWS = ColwiseParallel, RowwiseParallel
INNER = {
    "attention.q": COLUMNS(),
    "attention.k": COLUMNS(),
    "attention.v": COLUMNS(),
    "attention.out": ROWS(),
    "mlp.up": COLUMNS(),
    "mlp.down": ROWS(),
}
PLANS = {
    "rows": INNER
    | {
        "embed": ROWS(input_layouts=Replicate()),
        "head": COLUMNS(output_layouts=Replicate()),
    },
    "columns": INNER
    | {
        "embed": COLUMNS(output_layouts=Replicate()),
        "head": ROWS(input_layouts=Replicate()),
    },
    "sequence": {
        "embed": ROWS(input_layouts=Replicate(), output_layouts=Shard(1)),
        "first": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        "attention.q": COLUMNS(),
        "attention.k": COLUMNS(),
        "attention.v": COLUMNS(),
        "attention.out": ROWS(output_layouts=Shard(1)),
        "second": SequenceParallel(),
        "mlp": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        "mlp.up": COLUMNS(),
        "mlp.down": ROWS(output_layouts=Shard(1)),
        "head": COLUMNS(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def split(net: nn.Module, mesh, plan: str) -> nn.Module:
    """Return the network, split over the ranks of a mesh."""
    return parallelize_module(net, mesh, PLANS[plan])


def batches_of(seed: int, count: int, length: int = 4, size: int = 5):
    """Return batches of tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(TOKENS, (count, length), generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))
