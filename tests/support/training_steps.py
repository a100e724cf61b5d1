"""Models with their batches, and a training step of theirs in other ways."""

import copy
import math

import torch
import torch.nn.functional as F
from nets import Own, SequenceNet, TwiceNet, conv_net
from torch import nn
from torch.nn.utils import parametrizations

TOKENS, CLASSES = 11, 5


class Texts(nn.Module):
    """Attention with dropout, a token in front, learned positions, a tied head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(TOKENS, 8)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.front = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, TOKENS)
        self.head.weight = self.words.weight

    def forward(self, x):
        x = self.words(x) + self.places
        x = torch.cat([self.front.expand(len(x), -1, -1), x], 1)
        return self.head(self.layers(x)[:, 0])


class States(nn.Module):
    """Two recurrent layers with dropout between; the states have no samples first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 6, 2, dropout=0.3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        outputs, (state, _) = self.layer(x.mT.transpose(0, 1))
        return {"outputs": self.head(outputs.mean(0)), "state": state}


def coded(m, x):
    """Look up what values of the samples choose: then each batch is checked."""
    x = m.first(x.mT)
    return m.last(m.words(x.argmax(-1)).mean(1) + x.mean(1))


def words(first, *others):
    return nn.Sequential(first, nn.Flatten(), nn.Dropout(), nn.Linear(40, CLASSES))


def by_class(model, batch):
    x, y = batch
    found = model(x)
    outputs = found["outputs"] if isinstance(found, dict) else found
    return F.cross_entropy(outputs, y, reduction="none")


def in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return by_class(model, batch).float()


def images(n):
    return torch.randn(n, 3, 9, 9), torch.randint(CLASSES, (n,))


def series(n, channels=4, length=12):
    return torch.randn(n, channels, length), torch.randint(CLASSES, (n,))


def tokens(n):
    return torch.randint(TOKENS, (n, 5)), torch.randint(CLASSES, (n,))


def tied(n):
    return torch.randn(n, 4, 8, 8), torch.randint(CLASSES, (n,))


def dense(dtype=torch.float32):
    """Return a network of two weights, for rows of four features."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(n=5):
    return torch.randn(n, 4), torch.randint(3, (n,))


MODELS = {
    "convolutions": (lambda: conv_net().eval(), images),
    "conv1d": (SequenceNet, series),
    "several uses": (lambda: TwiceNet().eval(), tied),
    "attention": (Texts, tokens),
    "recurrent": (States, series),
    "linear layers by other functions": (
        lambda: Own(
            lambda m, x: torch.tensordot(
                torch.einsum("oi,nti->nto", m.b, torch.inner(x, m.a).tanh()).tanh(),
                *(m.c, 1),
            ).mean(1),
            a=nn.Parameter(torch.randn(8, 12)),
            b=nn.Parameter(torch.randn(6, 8)),
            c=nn.Parameter(torch.randn(6, CLASSES)),
        ),
        series,
    ),
    "parametrized": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv1d(4, 3, 3)),
            *(nn.Flatten(), nn.Dropout(), nn.LayerNorm(30), nn.Linear(30, CLASSES)),
        ),
        series,
    ),
    "codes": (
        lambda: Own(
            coded,
            **{"first": nn.Linear(4, 8), "words": nn.Embedding(8, 8)},
            last=nn.Linear(8, CLASSES),
        ),
        series,
    ),
    "sparse lookups": (lambda: words(nn.Embedding(TOKENS, 8, sparse=True)), tokens),
    "scaled lookups": (lambda: words(nn.Embedding(TOKENS, 8, max_norm=1.0)), tokens),
}

TO_ROUNDING = "recurrent"


def single(model, batch, losses=by_class):
    """Return what a training step does: the gradients of its samples, by name.

    They are of one graph, so dropout is the same.
    """
    model = copy.deepcopy(model)
    named, options = dict(model.named_parameters()), {"materialize_grads": True}
    found = [
        torch.autograd.grad(loss, [*named.values()], retain_graph=True, **options)
        for loss in losses(model, batch)
    ]
    return {
        name: torch.stack([grads[i].to_dense().double() for grads in found])
        for i, name in enumerate(named)
    }


def plain(model, batch, losses=by_class):
    """Return each ``.grad`` after an ordinary backward pass."""
    model = copy.deepcopy(model)
    losses(model, batch).mean().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_fisher(found, gradients, tolerance=1e-5):
    largest = max(float(g.square().sum()) for g in gradients.values())
    for name, g in gradients.items():
        error = (found.fisher[name].double() - g.square().mean(0)).norm()
        assert error <= tolerance * g.square().mean(0).norm() + 1e-9 * largest, name
        error = (found.mean[name].double() - g.mean(0)).norm()
        assert error <= tolerance * math.sqrt(g.square().sum() + 1e-9 * largest), name


def assert_same(model, grads, tolerance=0.0):
    for name, p in model.named_parameters():
        assert p.grad.layout == grads[name].layout
        ours, theirs = p.grad.to_dense(), grads[name].to_dense()
        assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm()), name


def step(context, model, batch, losses=by_class):
    with context:
        losses(model, batch).mean().backward()
    return context.result()
