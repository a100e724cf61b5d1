"""Calls whose rows are of samples in uneven numbers, in any order: without a loop."""

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from nets import Own
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fisherprune as fp
from fisherprune.losses import classification

CLASSES, EXPERTS = 5, 3


def drawn(*shape):
    return nn.Parameter(torch.randn(shape) / 2)


def read(forward, **parts):
    """Return a module that classifies what ``forward`` makes of ``[N, 4, 8]``."""
    return Own(forward, head=nn.Linear(6, CLASSES), **parts)


def given(*sizes):
    return [(torch.randn(n, 4, 8), torch.randint(CLASSES, (n,))) for n in sizes]


def sent(x):
    """Return the tokens, the expert of each, and its weight."""
    rows = x.flatten(0, 1)
    scores = rows[:, :EXPERTS].softmax(1)
    weight, expert = scores.max(1)
    return rows, expert, weight


def gathered(m, x, rows):
    return m.head(rows.unflatten(0, (len(x), -1)).mean(1))


def each_in_turn(m, x):
    """Run each expert that is hit on its tokens, as models with experts do."""
    rows, expert, weight = sent(x)
    out = rows.new_zeros(len(rows), 6)
    hit = F.one_hot(expert, EXPERTS).sum(0).nonzero()
    for (number,) in hit:
        (token,) = torch.where(expert == number)
        h = F.linear(rows[token], m.up[number]).tanh()
        h = F.linear(h, m.down[number], m.bias[number])
        out.index_add_(0, token, h * weight[token, None])
    return gathered(m, x, out)


def modules_in_turn(m, x):
    rows, expert, _ = sent(x)
    out = rows.new_zeros(len(rows), 6)
    for number, layer in enumerate([m.one, m.two, m.three]):
        chosen = expert == number
        out[chosen] = m.norm(layer(rows[chosen])).tanh()
    return gathered(m, x, out)


def grouped(m, x):
    """Sort the tokens by expert, and multiply them in one call."""
    rows, expert, weight = sent(x)
    order = expert.argsort(stable=True)
    ends = torch.bincount(expert, minlength=EXPERTS).cumsum(0).int()
    h = products(rows[order], m.up.mT, ends) + m.shift[expert[order]]
    h = products(h.tanh(), m.down, ends)[:, :6] * weight[order, None]
    return gathered(m, x, h[order.argsort()])


def products(rows, weights, ends):
    if rows.dtype == torch.float32:
        return torch._grouped_mm(rows, weights, offs=ends)
    parts = rows.tensor_split(ends[:-1].long())  # it has no float64
    pairs = zip(parts, weights, strict=True)
    return torch.cat([part @ weight for part, weight in pairs])


def selected(m, x):
    """Give every expert all tokens, and select a weight for each token."""
    rows, expert, _ = sent(x)
    h = torch.bmm(m.up[expert], rows.unsqueeze(2)).squeeze(2) + m.shift[expert]
    return gathered(m, x, h.tanh())


def with_padding(m, x):
    """Leave out what is padding: any token but the first."""
    real = torch.cat([x[:, :1, 0] < 9, x[:, 1:, 0] > 0], 1)
    tokens = (x[..., 1].abs() * 4).long() % 7
    h = m.norm(m.table(tokens[real]) * m.scale + m.fc(x[real])) @ m.w
    out = x.new_zeros(*real.shape, 6)
    out[real] = (h + m.more).tanh()
    return m.head(out.mean(1))


def step_by_step(m, x):
    """Run a cell over packed sequences: fewer samples in each later step."""
    lengths, order = (1 + (x[:, 1:, 0] > 0).sum(1)).sort(descending=True)
    packed = pack_padded_sequence(x[order], lengths, batch_first=True)
    state, start = x.new_zeros(len(x), 6), 0
    for size in packed.batch_sizes.tolist():
        data = packed.data[start : start + size]
        state = torch.cat([m.cell(data, state[:size]), state[size:]])
        start += size
    return m.head(state[order.argsort()])


def by_other_functions(m, x):
    """Run linear layers that are no ``F.linear`` on what is no padding."""
    real = torch.cat([x[:, :1, 0] < 9, x[:, 1:, 0] > 0], 1)
    h = torch.inner(x[real], m.a).tanh()
    h = torch.einsum("oi,ri->ro", m.b, h).tanh()
    out = x.new_zeros(*real.shape, 6)
    out[real] = torch.tensordot(h, m.c, 1)
    return m.head(out.mean(1))


def one_by_one(m, x):
    """Run a layer on each sequence without its padding."""
    lengths = 1 + (x[:, 1:, 0] > 0).sum(1)
    parts = [m.fc(own[:n]).tanh().sum(0) for own, n in zip(x, lengths, strict=True)]
    return m.head(torch.stack(parts))


def in_one_row(m, x):
    """Join all sequences to one, without padding, in a batch of one."""
    real = x[..., 0] > -0.5
    h = m.fc(m.norm(x[real].unsqueeze(0))).tanh()[0]
    out = x.new_zeros(*real.shape, 6)
    out[real] = h
    return m.head(out.mean(1))


def bags(mode, *, even=False, weighted=False, **options):
    """Look tokens up in bags of the tokens that are not padding, maybe of none."""

    def forward(m, x):
        tokens = (x[..., 1].abs() * 4).long() % 7
        real = torch.ones_like(tokens, dtype=torch.bool) if even else x[..., 0] > 0
        ends = real.sum(1).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends if m.ends else ends[:-1]])
        weights = x[..., 2][real] if weighted else None
        return m.head(m.table(tokens[real], starts, weights).tanh())

    ends = options.get("include_last_offset", False)
    table = nn.EmbeddingBag(7, 6, mode=mode, **options)
    model = read(forward, table=table)
    model.ends = ends
    return model


MODELS = {
    "experts in turn": lambda: read(
        each_in_turn,
        up=drawn(EXPERTS, 7, 8),
        down=drawn(EXPERTS, 6, 7),
        bias=drawn(EXPERTS, 6),
    ),
    "modules in turn": lambda: read(
        modules_in_turn,
        one=nn.Linear(8, 6),
        two=nn.Linear(8, 6, bias=False),
        three=nn.Linear(8, 6),
        norm=nn.LayerNorm(6),
    ),
    "grouped products": lambda: read(
        grouped,
        up=drawn(EXPERTS, 8, 8),
        down=drawn(EXPERTS, 8, 8),
        shift=drawn(EXPERTS, 8),
    ),
    "weights selected": lambda: read(
        selected, up=drawn(EXPERTS, 6, 8), shift=drawn(EXPERTS, 6)
    ),
    "without padding": lambda: read(
        with_padding,
        fc=nn.Linear(8, 8),
        norm=nn.RMSNorm(8),
        table=nn.Embedding(7, 8),
        scale=drawn(8),
        w=drawn(8, 6),
        more=drawn(1, 6),
    ),
    "by other functions": lambda: read(
        by_other_functions, a=drawn(7, 8), b=drawn(8, 7), c=drawn(8, 6)
    ),
    "packed, step by step": lambda: read(step_by_step, cell=nn.GRUCell(8, 6)),
    "one by one": lambda: read(one_by_one, fc=nn.Linear(8, 6)),
    "in one row": lambda: read(in_one_row, fc=nn.Linear(8, 6), norm=nn.LayerNorm(8)),
    "bags, sum": lambda: bags("sum", weighted=True),
    "bags, mean": lambda: bags("mean", padding_idx=3, include_last_offset=True),
    "bags, max": lambda: bags("max"),
    "bags, max, padding": lambda: bags("max", padding_idx=3, include_last_offset=True),
    "bags of one size": lambda: bags("mean", even=True),
    "bags of one size, max": lambda: bags("max", even=True, padding_idx=2),
}


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("what", MODELS)
@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
def test_moments(what, group_size):
    for sizes in [(2, 2, 3, 1, 2), (9, 4), (1, 6)]:
        model, batches = MODELS[what](), given(*sizes)
        named = dict(model.named_parameters())
        expected = truth.moments_of_losses(
            model, batches, [*named], classification, [group_size]
        )[group_size]
        found = fp.gradient_moments(
            model, batches, parameters=named, group_size=group_size
        )
        assert_moments(found, {n: m for n, m in expected.items() if m[1].any()}, 1e-4)
        assert not any({"loop", "vmap"} & {*ways} for ways in found.paths.values())


@pytest.mark.parametrize("what", ["experts in turn", "grouped products", "bags, max"])
def test_the_gauss_newton_diagonal(what):
    model, batches = MODELS[what](), given(3, 3, 2)
    named = dict(model.named_parameters())
    found = fp.gauss_newton_diagonal(model, batches, parameters=named)
    x = torch.cat([x for x, _ in batches])
    for name, wanted in truth.gauss_newton_diagonal(model, x, named).items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def test_an_expert_that_all_samples_choose_together():
    """It is another one for a sample alone, though not for the last one."""

    def forward(m, x):
        number = (x[:, :1, 0].sum() > 0).long()
        return m.head(torch.tanh(x.mean(1) @ m.up[number]))

    model = read(forward, up=drawn(2, 8, 6))
    ((x, y),) = given(3)
    x[:, 0, 0] = torch.tensor([-1.0, -2.0, 5.0])
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        fp.gradient_moments(model, [(x, y)], parameters={"up": model.up})
