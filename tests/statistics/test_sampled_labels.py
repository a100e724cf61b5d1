"""Squared gradients for labels that are drawn from the model."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import truth
from checks import assert_moments
from nets import Own, batches, conv_net, data
from torch import nn

import fisherprune as fp
from fisherprune.losses import binary, classification, next_token, regression, sequences

SAMPLED = {"labels": "sampled"}
IGNORED = torch.tensor([[0, 1, -100], [-100, 2, -100], [3, -100, 0], [3, 3, 3]])


def mlp(outputs=4):
    return Own(
        lambda m, x: m.head(torch.tanh(m.fc(x))),
        fc=nn.Linear(5, 6),
        head=nn.Linear(6, outputs),
    )


def named(model):
    return {"parameters": dict(model.named_parameters())}


def seed():
    return int(torch.randint(2**31, ()))


def of_every_label(model, x, names):
    """Return {name: (mean, variance of a draw of it)} of F, by all labels of each."""
    model, rows = truth.in_double(model), []
    weights = [dict(model.named_parameters())[name] for name in names]
    for one in x.double():
        scores = model(one[None])[0]
        p = scores.softmax(0).detach()
        grads = [
            torch.autograd.grad(-s, weights, retain_graph=True)
            for s in scores.log_softmax(0)
        ]
        squares = [torch.stack(g).square() for g in zip(*grads, strict=True)]
        means = [torch.einsum("c,c...->...", p, s) for s in squares]
        fourth = [torch.einsum("c,c...->...", p, s * s) for s in squares]
        rows.append([(m, f - m * m) for m, f in zip(means, fourth, strict=True)])
    return {
        name: (
            sum(m for m, _ in column) / len(x),
            sum(v for _, v in column) / len(x) ** 2,
        )
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def test_draws_are_unbiased_and_scatter_as_labels_do():
    model, (x, y) = mlp(), data((5,), classes=4)
    options, draws = {**SAMPLED, **named(model)}, 100
    found = fp.gradient_moments(model, [(x, y)], draws=draws, seed=seed(), **options)
    squares = []
    for name, (mean, variance) in of_every_label(
        model, x, options["parameters"]
    ).items():
        error = found.fisher[name].double() - mean
        squares.append((error.square() / (variance / draws)).flatten())
    assert 0.02 < torch.cat(squares).mean() < 8  # 1 in expectation


def test_they_converge_to_the_gauss_newton_diagonal():
    model, (x, y) = mlp(), data((5,), classes=4)
    exact = fp.gauss_newton_diagonal(model, [(x, y)], **named(model))

    def error(draws):
        options = {**SAMPLED, **named(model), "seed": seed()}
        found = fp.gradient_moments(model, [(x, y)], draws=draws, **options)
        return torch.cat([(found.fisher[n] - d).flatten() for n, d in exact.items()])

    few, many = (
        torch.stack([error(draws) for _ in range(6)]).square().mean().sqrt()
        for draws in (4, 64)
    )
    assert 1.6 < few / many < 10  # 4 in expectation


FACTORS = {
    "mse_loss": ({"loss_fn": F.mse_loss}, 2 / 4),
    "regression": ({"losses": partial(regression, reduction="sum")}, 2.0),
    "binary": ({"losses": binary}, 1 / 4),
    "bce": ({"loss_fn": nn.BCEWithLogitsLoss(reduction="sum")}, 1.0),
    "classification": ({"losses": classification}, 1.0),
    "positions": ({"losses": sequences}, 1 / 3),
}


@pytest.mark.parametrize("name", FACTORS)
def test_of_other_losses_they_are_a_multiple_of_the_curvature(name):
    """Squared gradients have the loss's factor squared, its Hessian has it once."""
    options, factor = FACTORS[name]
    model, x = mlp(), torch.randn(50, 5)
    y = torch.rand(50, 4).round()
    if name == "classification":
        y = torch.randint(4, (50,))
    if name == "positions":
        x, y = torch.randn(50, 3, 5), torch.randint(4, (50, 3))
    options = {**options, **named(model)}
    exact = fp.gauss_newton_diagonal(model, [(x, y)], **options)
    found = fp.gradient_moments(
        model, [(x, y)], **SAMPLED, draws=60, seed=seed(), **options
    )
    for parameter, diagonal in exact.items():
        quotient = found.fisher[parameter].sum() / diagonal.sum()
        assert abs(quotient / factor - 1) < 0.25, parameter


def test_by_hand_where_every_label_has_the_same_square():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0], [0.0]])
    options = {"losses": binary, **named(model)}
    found = fp.gradient_moments(model, [(x, y)], **SAMPLED, seed=seed(), **options)
    # The gradient is p - y times x with p = 1/2, and -1/2 and 1/2 for given labels.
    torch.testing.assert_close(found.fisher["weight"], torch.tensor([[1 / 8, 9 / 8]]))
    torch.testing.assert_close(found.mean["weight"], torch.tensor([[-0.25, 0.75]]))
    model.weight.data = torch.tensor([[1e-6, -1e-6]])
    settings = {"settings": fp.Settings(labels="sampled", draws=3), **options}
    scores = fp.score_all(model, [(x, y)], ["fisher_diag", "snip", "fts"], **settings)
    torch.testing.assert_close(
        scores["fisher_diag"]["weight"], torch.tensor([[1 / 8, 9 / 8]])
    )
    for code in ("snip", "fts"):  # of first order: the mean for given labels
        wanted = torch.tensor([[0.25e-6, 0.75e-6]])
        torch.testing.assert_close(scores[code]["weight"], wanted, rtol=1e-4, atol=0)


def test_the_mean_is_that_of_given_labels():
    model, (x, y) = conv_net(), data((3, 9, 9))
    given = fp.gradient_moments(model, batches(x, y, 5))
    found = fp.gradient_moments(model, batches(x, y, 5), **SAMPLED, draws=2)
    assert (given.labels, found.labels) == ("given", "sampled")
    assert (found.samples, found.groups) == (13, 13)
    assert found.paths == given.paths
    for name, mean in given.mean.items():
        assert torch.equal(found.mean[name], mean)
        assert not torch.equal(found.fisher[name], given.fisher[name])
    for code in ("snip", "grad_norm"):
        wanted = fp.score(model, [(x, y)], code)
        for draws in (None, 2):
            settings = fp.Settings(labels="sampled", draws=draws)
            scores = fp.score(model, [(x, y)], code, settings=settings)
            for name, score in wanted.items():
                torch.testing.assert_close(scores[name], score, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("draws", [1, 2])
def test_batches_do_not_change_draws(group_size, draws):
    model, (x, y) = conv_net(), data((3, 9, 9))
    options = {**SAMPLED, "group_size": group_size, "draws": draws, "seed": seed()}
    one, *others = (
        fp.gradient_moments(model, batches(x, y, size), **options)
        for size in (13, 5, 1)
    )
    assert one.groups == -(-13 // group_size)
    for other in others:
        for name, fisher in one.fisher.items():
            assert truth.relative_error(other.fisher[name], fisher.double()) < 1e-4
    again = fp.gradient_moments(model, [(x, y)], **options)
    options["seed"] += 1
    other = fp.gradient_moments(model, [(x, y)], **options)
    for name, fisher in one.fisher.items():
        assert torch.equal(again.fisher[name], fisher)
        assert not torch.equal(other.fisher[name], fisher)


@pytest.mark.parametrize("group_size", [1, 2])
def test_draws_are_averaged(group_size):
    """Those that a pass with fewer draws has are the first of another's."""
    model, (x, y) = mlp(), data((5,), classes=4)
    options = {**SAMPLED, **named(model), "group_size": group_size, "seed": seed()}
    one, two = (
        fp.gradient_moments(model, [(x, y)], draws=draws, **options) for draws in (1, 2)
    )
    for name, fisher in two.fisher.items():
        second = 2 * fisher - one.fisher[name]
        assert (second >= -1e-6 * fisher).all()
        assert not torch.allclose(second, fisher)


def test_padding_changes_no_draw():
    model = Own(None, embed=nn.Embedding(6, 5), head=nn.Linear(5, 6))
    model.forward = lambda input_ids, attention_mask: model.head(
        torch.tanh(model.embed(input_ids))
    )
    tokens = torch.randint(1, 6, (4, 3))
    options = {"losses": next_token, **named(model), **SAMPLED, "seed": seed()}
    fishers = []
    for before, after in ((0, 0), (0, 2), (3, 1)):
        mask = F.pad(torch.ones_like(tokens), (before, after))
        batch = {"input_ids": F.pad(tokens, (before, after)), "attention_mask": mask}
        fishers.append(fp.gradient_moments(model, [batch], draws=2, **options).fisher)
    for name, fisher in fishers[0].items():
        for other in fishers[1:]:
            torch.testing.assert_close(other[name], fisher, rtol=1e-4, atol=1e-9)


def test_ignored_positions_have_no_gradient():
    model, x = mlp(), torch.randn(4, 3, 5)
    options = {"losses": sequences, **named(model), **SAMPLED, "seed": seed()}
    found = fp.gradient_moments(model, [(x, IGNORED)], **options)
    other = x.where((IGNORED != -100).unsqueeze(2), 7.0)
    again = fp.gradient_moments(model, [(other, IGNORED)], **options)
    for name, fisher in found.fisher.items():
        torch.testing.assert_close(again.fisher[name], fisher)


def test_samples_that_run_alone_have_the_same_draws():
    model, (x, y) = mlp(), data((5,), classes=4)
    alone = Own(
        lambda m, x: torch.stack([m.head(torch.tanh(m.fc(row))) for row in x]),
        fc=model.fc,
        head=model.head,
    )
    options = {**SAMPLED, **named(model), "draws": 2, "seed": seed()}
    wanted = fp.gradient_moments(model, batches(x, y, 5), **options)
    with pytest.warns(fp.FisherpruneWarning, match="ran once more for each sample"):
        found = fp.gradient_moments(alone, batches(x, y, 5), **options)
    expected = {
        n: (wanted.mean[n].double(), f.double()) for n, f in wanted.fisher.items()
    }
    assert_moments(found, expected, 1e-4)


def test_scaled_passes():
    tiny = Own(lambda m, x: m.net(x * 1e-25), net=mlp())
    x, y = data((5,), classes=4)
    settings = fp.Settings(labels="sampled", draws=2)
    scores = fp.score(tiny, batches(x, y, 5), "fisher_diag", settings=settings)
    assert scores["net.fc.weight"].max() > 0


def test_sums_of_shards():
    model, (x, y) = mlp(), data((5,), classes=4)
    options = {**named(model), "seed": 3}
    sampled = fp.gradient_moments(model, [(x, y)], **SAMPLED, draws=2, **options)
    both = sampled + sampled
    assert (both.samples, both.labels) == (26, "sampled")
    for name, fisher in sampled.fisher.items():
        torch.testing.assert_close(both.fisher[name], fisher)
    match = "GradientMoments: labels must be given on both sides of ., got sampled"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gradient_moments(model, [(x, y)], **named(model)) + sampled


@pytest.mark.parametrize(
    "options, match",
    [
        ({"labels": "drawn"}, "labels must be 'given' or 'sampled', got 'drawn'"),
        ({"draws": 2}, "draws must be 1 where labels are given, got 2"),
        ({**SAMPLED, "draws": 0}, "draws must be an integer of at least 1, got 0"),
        (
            {**SAMPLED, "loss_fn": lambda o, y: o.sum()},
            "loss_fn must be none .cross-entropy., .* binary; .*, for labels='sam",
        ),
        (
            {**SAMPLED, "losses": lambda m, b: m(b[0]).sum(1)},
            "losses must be none .cross-entropy., .*, for labels='sampled', got <fun",
        ),
    ],
)
def test_options_that_can_not_be(options, match):
    model, (x, y) = mlp(), data((5,), classes=4)
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gradient_moments(model, [(x, y)], **options)


def test_labels_that_are_refused_are_refused_before_data_is_read():
    settings = fp.Settings(labels="sampled")
    with pytest.raises(fp.FisherpruneError, match="for labels='sampled'"):
        fp.score(mlp(), None, "fts", loss_fn=F.l1_loss, settings=settings)
