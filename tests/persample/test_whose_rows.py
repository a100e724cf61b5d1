"""Rows of a batch that are not where they seem to be, or of one sample each."""

import pytest
import torch
import truth
from checks import assert_moments
from nets import Own
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fisherprune as fp
from fisherprune.losses import classification

CLASSES = 5


def read(forward, width=6, **parts):
    """Return a module that reads ``[N, T, 8]``, a layer of 6 features in it."""
    parts = {"fc": nn.Linear(8, 6), "head": nn.Linear(width, CLASSES)} | parts
    return Own(forward, **parts)


def drawn(*shape):
    return nn.Parameter(torch.randn(shape))


def given(*sizes, length=4):
    return [(torch.randn(n, length, 8), torch.randint(CLASSES, (n,))) for n in sizes]


def in_order(m, x, order):
    """Run a layer on the samples in another order."""
    return m.head(torch.tanh(m.fc(x[order])).mean(1)[order.argsort()])


def by_length(m, x):
    """Sort sequences by their lengths, as packed ones must be."""
    lengths, order = (1 + (x[:, 1:, 0] > 0).sum(1)).sort(descending=True)
    packed = pack_padded_sequence(x[order], lengths, batch_first=True)
    outputs, _ = pad_packed_sequence(m.layer(packed)[0], batch_first=True)
    return m.head(outputs.sum(1)[order.argsort()])


def routed(m, x):
    """Sort all tokens by where they are sent to."""
    rows = x.flatten(0, 1)
    order = (rows[:, 0] > 1).long().argsort(stable=True)
    h = torch.tanh(m.fc(rows[order]))[order.argsort()]
    return m.head(h.unflatten(0, (len(x), -1)).mean(1))


def split(m, x):
    """Give the tokens, sorted, to two layers by their counts."""
    rows, second = x.flatten(0, 1), (x[..., 0] > 0).flatten().long()
    order = second.argsort(stable=True)
    parts = rows[order].split(second.bincount(minlength=2).tolist())
    h = torch.cat([torch.tanh(m.fc(parts[0])), torch.sigmoid(m.other(parts[1]))])
    return m.head(h[order.argsort()].unflatten(0, (len(x), -1)).mean(1))


def chosen(m, x):
    """Run a layer on the two tokens of each sample with the largest scores."""
    places = x[..., 0].topk(2, 1).indices
    x = x.gather(1, places.unsqueeze(2).expand(-1, -1, 8))
    return m.head(torch.tanh(m.fc(x)).mean(1))


def masked(m, x):
    h = x.new_zeros(*x.shape[:2], 6)
    kept = x[..., 0] > 0
    h[kept] = torch.tanh(m.fc(x[kept]))
    return m.head(h.mean(1))


def nonzero(m, x):
    sample, position = (x[..., 0] > 0).nonzero(as_tuple=True)
    rows = torch.tanh(m.fc(x[sample, position]))
    return m.head(x.new_zeros(len(x), 6).index_add(0, sample, rows))


def as_many(m, x):
    """Take as many rows of all samples, by their places."""
    sample, position = (x[..., 0].argsort(1).argsort(1) > 1).nonzero(as_tuple=True)
    rows = torch.tanh(m.fc(x[sample, position]))
    return m.head(rows.unflatten(0, (len(x), -1)).mean(1))


def weighed(lowest):
    """Average the tokens of samples in another order, by a mask in front of softmax."""

    def forward(m, x):
        mask = torch.zeros_like(x[..., 0]).masked_fill(x[..., 0] > 0.5, lowest)
        mask[:, 0] = 0
        weights = (m.places + mask).softmax(1).unsqueeze(2)
        h = torch.tanh(m.fc(x.flip(0)))[[*range(len(x))][::-1]]
        return m.head((h * weights).sum(1))

    return read(forward, places=drawn(4))


MODELS = {
    "masked with -inf": lambda: weighed(-torch.inf),
    "masked with the least number": lambda: weighed(torch.finfo().min),
    "sorted": lambda: read(lambda m, x: in_order(m, x, x[:, 0, 0].argsort())),
    "sorted, samples second": lambda: read(
        lambda m, x: in_order(
            m,
            x.transpose(0, 1)[:, x[:, 0, 0].argsort()].transpose(0, 1),
            torch.arange(len(x)),
        )[x[:, 0, 0].argsort().argsort()]
    ),
    "shuffled": lambda: read(lambda m, x: in_order(m, x, torch.randperm(len(x)))),
    "turned around": lambda: read(
        lambda m, x: in_order(m, x, torch.arange(len(x)).flip(0))
    ),
    "packed by length": lambda: read(by_length, layer=nn.GRU(8, 6, batch_first=True)),
    "routed": lambda: read(routed),
    "split by counts": lambda: read(split, other=nn.Linear(8, 6)),
    "chosen": lambda: read(chosen),
    "masked": lambda: read(masked),
    "nonzero": lambda: read(nonzero),
    "as many of each": lambda: read(as_many),
}


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("what", MODELS)
@pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning")
def test_moments(what, group_size):
    # Small batches: the first one is in order by chance, later ones are not.
    for _ in range(5):
        model, batches = MODELS[what](), given(2, 2, 3, 1, 2)
        named = dict(model.named_parameters())
        expected = truth.moments_of_losses(
            model, batches, [*named], classification, [group_size]
        )[group_size]
        found = fp.gradient_moments(
            model, batches, parameters=named, group_size=group_size
        )
        assert_moments(found, {n: m for n, m in expected.items() if m[1].any()}, 1e-4)


@pytest.mark.parametrize("what", ["sorted", "routed"])
@pytest.mark.filterwarnings("ignore::fisherprune.FisherpruneWarning")
def test_the_gauss_newton_diagonal(what):
    model, batches = MODELS[what](), given(3, 3, 2)
    named = dict(model.named_parameters())
    found = fp.gauss_newton_diagonal(model, batches, parameters=named)
    x = torch.cat([x for x, _ in batches])
    for name, wanted in truth.gauss_newton_diagonal(model, x, named).items():
        assert truth.relative_error(found[name], wanted) < 1e-4, name


def keeping(tables=None):
    """Return what keeps, for the next pass, a table computed from a parameter.

    In the model, or in ``tables``.
    """

    def forward(m, x, tables=tables):
        tables = m.tables if tables is None else tables
        if len(x) not in tables:
            tables[len(x)] = (m.start * m.start).expand(len(x), -1)
        return m.head(torch.tanh(m.fc(x).mean(1) + tables[len(x)]))

    return forward


def anew(m, x):
    return keeping()(m, x, {})


def kept_moments(model, sizes):
    """Return the moments of a model that keeps tables, compared with one that doesn't.

    Nothing is kept when the pass begins.
    """
    batches, named = given(*sizes), dict(model.named_parameters())
    found = fp.gradient_moments(model, batches, parameters=named, group_size=3)
    same = read(anew, **dict(model.named_children()), start=model.start)
    expected = truth.moments_of_losses(same, batches, [*named], classification, [3])
    assert_moments(found, expected[3])
    return found


SIZES = [(3, 3, 2, 2), (1, 3, 3), (1, 1, 1)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
def test_what_a_model_keeps_between_batches_is_forgotten(sizes):
    model = read(keeping(), start=drawn(1, 6), tables={})
    found = kept_moments(model, sizes)
    assert model.tables == {} and "loop" not in found.paths["start"]


def test_what_is_kept_elsewhere_is_found_by_a_loop():
    model = read(keeping({}), start=drawn(1, 6))
    with pytest.warns(fp.FisherpruneWarning, match="'start' .(what an|its gradient)"):
        found = kept_moments(model, (3, 3, 2, 2))
    assert found.paths["start"] == ("loop",)


@pytest.mark.parametrize("code", ["snip", "grasp", "obd"])
def test_scores_of_a_model_that_keeps_a_table(code):
    model = read(keeping(), start=drawn(1, 6), tables={})
    batches, named = given(3, 3, 2), dict(model.named_parameters())
    found = fp.score(model, batches, code, parameters=named)
    model.run = anew
    expected = fp.score(model, batches, code, parameters=named)
    for name in named:
        assert truth.relative_error(found[name], expected[name]) < 1e-5, name


def test_what_the_last_sample_gives_to_all_is_refused():
    model = read(lambda m, x: m.head(torch.tanh(m.fc(x) + m.fc(x[-1:])).mean(1)))
    named = dict(model.named_parameters())
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        fp.gradient_moments(model, given(3), parameters=named)


def attending(m, x, constant):
    """Average over samples what is the same for all of them: no value shows it."""
    q = constant(m, x)
    h = ((q @ q.T).softmax(1) @ q) * x.sum((1, 2)).unsqueeze(1)
    return m.head(torch.tanh(h))


ALIKE = {
    "what a layer reads": lambda m, x: m.fc(m.norm(x[:, 0, :1]).expand(-1, 8)),
    "what a layer returns": lambda m, x: m.zero(torch.tanh(m.fc(x[:, 0]))),
}


def alike(what):
    zero, norm = nn.Linear(6, 6), nn.LayerNorm(1)
    nn.init.zeros_(zero.weight)
    nn.init.normal_(norm.bias)
    norm.weight.requires_grad_(False)  # its gradients are zero but for rounding
    model = read(lambda m, x: attending(m, x, ALIKE[what]), norm=norm, zero=zero)
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("what", ALIKE)
@pytest.mark.parametrize("size", [2, 3, 9])
def test_samples_that_mix_where_all_are_the_same(what, size):
    (model, named), batches = alike(what), given(size, 2)
    with pytest.warns(fp.FisherpruneWarning, match="loss reach rows of other samples"):
        found = fp.gradient_moments(model, batches, parameters=named)
    expected = truth.moments_of_losses(model, batches, [*named], classification, [1])[1]
    assert_moments(found, {n: m for n, m in expected.items() if m[1].any()})
    assert found.paths["head.weight"] == ("linear",)
    with pytest.raises(fp.FisherpruneError, match="loss reach rows of other samples"):
        with fp.moments(model, parameters=named):
            classification(model, batches[0]).mean().backward()


@pytest.mark.parametrize("size", [3, 9])
def test_samples_that_read_the_next_one_where_all_are_the_same(size):
    """The last one has none, alone as in its batch."""

    def forward(m, x):
        q = ALIKE["what a layer reads"](m, x)
        following = torch.cat([q[1:], torch.zeros_like(q[:1])])
        return m.head(torch.tanh(following * x.sum((1, 2)).unsqueeze(1)))

    (model, named), batches = alike("what a layer reads"), given(size, 3)
    model.run = forward
    with pytest.warns(fp.FisherpruneWarning, match="loss reach rows of other samples"):
        found = fp.gradient_moments(model, batches, parameters=named, group_size=3)
    assert found.paths["fc.weight"] == ("loop",)


@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
@pytest.mark.parametrize("what", ALIKE)
def test_samples_that_are_the_same_do_not_mix_by_that(what):
    def forward(m, x):
        return m.head(torch.tanh(ALIKE[what](m, x) * x.sum((1, 2)).unsqueeze(1)))

    (model, named), batches = alike(what), given(3, 2)
    model.run = forward
    found = fp.gradient_moments(model, batches, parameters=named)
    expected = truth.moments_of_losses(model, batches, [*named], classification, [1])[1]
    assert_moments(found, {n: m for n, m in expected.items() if m[1].any()})


def backward_passes(first, then, size, options, **parts):
    """Return the samples of those of a pass, at the tensor that ``first`` returns."""
    passes = []

    def forward(m, x):
        h = first(m, x).clone()  # so a sample alone is run, too
        with torch._C.DisableTorchFunction():  # no hook of the model's
            h.register_hook(lambda grad: passes.append(len(grad)))
        return then(m, h)

    model = read(forward, **parts)
    named = dict(model.named_parameters())
    fp.gradient_moments(model, given(size), parameters=named, **options)
    return passes


FURTHER = {5: [5, 5], 10: [2, 2, 10]}  # the first ones show whether samples mix


@pytest.mark.parametrize("size", FURTHER)
@pytest.mark.parametrize("zero", ["head", "fc"])
@pytest.mark.parametrize("options", [{}, {"losses": classification}])
def test_a_layer_of_zeros_costs_few_further_backward_passes(zero, options, size):
    parts = {"fc": nn.Linear(8, 6), "head": nn.Linear(6, CLASSES)}
    nn.init.zeros_(parts[zero].weight)
    first, then = lambda m, x: m.fc(x), lambda m, h: m.head(torch.tanh(h).mean(1))
    assert backward_passes(first, then, size, options, **parts) == FURTHER[size]


@pytest.mark.parametrize("size", FURTHER)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_cost_few_further_backward_passes(kind, size):
    layer = kind(8, 6, num_layers=2, batch_first=True)
    first, then = lambda m, x: m.layer(x)[0], lambda m, h: m.head(h.mean(1))
    assert backward_passes(first, then, size, {}, layer=layer) == FURTHER[size]


@pytest.mark.parametrize("first", [True, False])
def test_a_mask_that_whole_sequences_do_not_need(first):
    """A sample without padding, alone, leads to other calls than the batch."""

    def forward(m, batch):
        bias, real = m.bias, batch["mask"]
        if not real.all():
            bias = torch.where(real[:, None], bias, -1e9)
        x = batch["x"]
        return m.head(torch.tanh(m.fc((x @ x.mT + bias).softmax(2) @ x)).mean(1))

    def losses(model, batch):
        scores = model(batch)
        return nn.functional.cross_entropy(scores, batch["labels"], reduction="none")

    model = read(forward, bias=drawn(4, 4))
    ((x, labels),) = given(3)
    mask = torch.arange(4) < torch.tensor([2, 3, 4]).view(3, 1)
    batches = [{"x": x, "mask": mask if first else mask.flip(0), "labels": labels}]
    named = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches, losses=losses, parameters=named)
    expected = truth.moments_of_losses(model, batches, [*named], losses, [1])[1]
    assert_moments(found, expected)
    assert all("loop" not in ways for ways in found.paths.values())


def test_rows_that_are_all_the_same_in_the_first_batch():
    """Nor has it gradients there: only later batches show whose rows are whose."""

    def forward(m, x):
        x = torch.relu(x)
        rows = torch.tanh(m.fc(x.transpose(0, 1).flatten(0, 1)))
        h = rows.unflatten(0, (x.shape[1], -1)).mean(0)
        return m.head(h * x.sum((1, 2)).unsqueeze(1))

    model, (first, second) = read(forward), given(3, 3)
    batches, named = (
        [(-first[0].abs(), first[1]), second],
        dict(model.named_parameters()),
    )
    found = fp.gradient_moments(model, batches, parameters=named)
    assert found.paths["fc.weight"] == ("linear",)
    expected = truth.moments_of_losses(model, batches, [*named], classification, [1])[1]
    assert_moments(found, expected)


@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("first", [True, False])
def test_rows_that_are_small_beside_what_else_is_read(scale, first):
    def forward(m, x):
        rows = (x if first else x.transpose(0, 1)).flatten(0, 1)
        rows = torch.tanh(m.other(torch.tanh(m.fc(rows)) * scale) / scale)
        sizes = (len(x), -1) if first else (-1, len(x))
        return m.head(rows.unflatten(0, sizes).mean(1 if first else 0))

    model, batches = read(forward, other=nn.Linear(6, 6, bias=False)), given(3, 3, 2)
    named = dict(model.named_parameters())
    found = fp.gradient_moments(model, batches, parameters=named)
    assert found.paths["other.weight"] == ("linear",)
    expected = truth.moments_of_losses(model, batches, [*named], classification, [1])[1]
    assert_moments(found, expected)


@pytest.mark.filterwarnings("error:.*ran once more:fisherprune.FisherpruneWarning")
def test_gradients_whose_squares_vanish_are_those_of_their_samples():
    def forward(m, x):
        rows = torch.tanh(m.fc(x.transpose(0, 1).flatten(0, 1)))
        return m.head(rows.unflatten(0, (x.shape[1], -1)).mean(0))

    model, batches = read(forward), given(9, 2)
    model.head.weight.data *= 1e-22
    named = dict(model.named_parameters())
    with pytest.warns(fp.FisherpruneWarning, match="squared gradients of 'fc.weight'"):
        found = fp.gradient_moments(model, batches, parameters=named)
    assert found.paths["fc.weight"] == ("linear",)
