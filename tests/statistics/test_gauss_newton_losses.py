"""Gauss-Newton diagonals of all losses, exact and estimated, against autograd's."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import truth
from nets import Mixing, Own, batches, conv_net, data
from torch import nn

import fisherprune as fp
from fisherprune.losses import binary, classification, next_token, regression, sequences

C, T = 4, 3
IGNORED = torch.tensor([[0, 1, -100], [-100, 2, -100], [-100] * 3, [3, 3, 3]])


def mlp(*, positions=False):
    """Return scores [N, C], or of inputs [N, T, 5] scores [N, C, T]."""

    def forward(m, x):
        found = m.head(torch.tanh(m.fc(x)))
        return found.mT if positions else found

    return Own(forward, fc=nn.Linear(5, 6), head=nn.Linear(6, C))


class LanguageModel(nn.Module):
    """Scores of tokens; called by keywords."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 5), nn.Linear(5, 6)

    def forward(self, *, input_ids, attention_mask):
        return self.head(torch.tanh(self.embed(input_ids).cumsum(1)))


def of(loss_fn):
    """Return the losses of a lone float64 sample by a loss function."""
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()
    return lambda model, batch: loss_fn(model(batch[0]), batch[1]).reshape(1)


def of_classes():
    return mlp(), (torch.randn(4, 5), torch.randint(C, (4,)))


def of_numbers():
    return mlp(), (torch.randn(4, 5), torch.randn(4, C))


def of_answers():
    return mlp(), (torch.randn(4, 5), torch.rand(4, C).round())


def of_pixels(labels=None):
    labels = torch.randint(C, (4, T)) if labels is None else labels
    return mlp(positions=True), (torch.randn(4, T, 5), labels)


def of_probabilities():
    return of_pixels(torch.rand(4, C, T).softmax(1))


def of_sequences():
    return mlp(), (torch.randn(4, T, 5), IGNORED)


def of_tokens(side="right"):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    tokens = torch.randint(6, (4, T))
    mask = mask if side == "right" else mask.flip(1)
    return LanguageModel(), {"input_ids": tokens, "attention_mask": mask}


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1])
SMOOTH = {"label_smoothing": 0.2, "weight": WEIGHT}
FUNCTIONS = {
    "default": (of_classes, None),
    "default, positions": (of_pixels, None),
    "default, probabilities": (of_probabilities, None),
    "cross_entropy": (partial(of_pixels, IGNORED[[0, 1, 3, 3]]), F.cross_entropy),
    "CrossEntropyLoss": (
        of_pixels,
        nn.CrossEntropyLoss(reduction="sum", ignore_index=1, **SMOOTH),
    ),
    "mse_loss": (of_numbers, F.mse_loss),
    "MSELoss": (of_numbers, nn.MSELoss(reduction="sum")),
    "BCEWithLogitsLoss": (of_answers, nn.BCEWithLogitsLoss()),
    "bce": (
        of_answers,
        partial(F.binary_cross_entropy_with_logits, reduction="sum"),
    ),
}
LOSSES = {
    "classification": (of_pixels, partial(classification, ignore_index=2, **SMOOTH)),
    "probabilities": (of_probabilities, partial(classification, **SMOOTH)),
    "sequences": (of_sequences, sequences),
    "next_token": (of_tokens, next_token),
    "next_token, sum": (of_tokens, partial(next_token, reduction="sum")),
    "regression": (of_numbers, regression),
    "regression, sum": (of_numbers, partial(regression, reduction="sum")),
    "binary": (of_answers, binary),
}
ALL = {
    **{n: (make, {"loss_fn": f}) for n, (make, f) in FUNCTIONS.items()},
    **{n: (make, {"losses": f}) for n, (make, f) in LOSSES.items()},
}


def case(name):
    """Return the model, a batch, the options of the pass and the true diagonal."""
    make, options = ALL[name]
    model, batch = make()
    losses = options.get("losses") or of(options["loss_fn"] or F.cross_entropy)
    options = {**options, "parameters": dict(model.named_parameters())}
    expected = truth.gauss_newton_of_losses(
        model, [batch], options["parameters"], losses
    )
    return model, batch, options, expected


@pytest.mark.parametrize("name", ALL)
def test_the_exact_diagonal(name):
    model, batch, options, expected = case(name)
    found = fp.gauss_newton_diagonal(model, [batch], **options)
    assert any(d.norm() > 1e-4 for d in expected.values())
    for parameter, diagonal in expected.items():
        torch.testing.assert_close(
            found[parameter].double(), diagonal, rtol=1e-4, atol=1e-7
        )
    scores = fp.score(model, [batch], "obd", **options)
    for parameter, weight in options["parameters"].items():
        wanted = weight.detach().double().square() * expected[parameter] / 2
        torch.testing.assert_close(
            scores[parameter].double(), wanted, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("name", ALL)
def test_the_estimate_is_unbiased(name):
    model, batch, options, expected = case(name)
    seed = int(torch.randint(2**31, ()))
    draws = {"draws": 60, "seed": seed}
    found = fp.gauss_newton_estimate(model, [batch], **draws, **options)
    assert found.draws == 60
    assert_within(found, expected)


def assert_within(found, expected):
    """Compare an estimate with the truth by its own standard error.

    The mean of the squared quotients is 1 in expectation.
    """
    squares = []
    for name, true in expected.items():
        error = found.mean[name].double() - true
        deviation = found.standard_error[name].double() + 1e-4 * true.abs() + 1e-9
        squares.append((error / deviation).square().flatten())
    assert torch.cat(squares).mean() < 8


def test_two_classes_need_one_draw_at_least():
    """A root of one column has a square without noise."""
    model, (x, y) = Mixing(lambda m, h: torch.tanh(h)), data((4,), classes=2)
    model.head = nn.Linear(4, 2)
    exact = fp.score(model, [(x, y)], "obd")
    settings = fp.Settings(draws=1)
    found = fp.score(model, [(x, y)], "obd", settings=settings, seed=5)
    for name, score in exact.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-9)


def test_obd_of_two_weights():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[4.0, -2.0]])
    batch = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
    # The mean of (w_1)^2 and (3 w_2)^2 has the second derivatives 1 and 9.
    options = {"loss_fn": F.mse_loss, "parameters": {"weight": model.weight}}
    for settings in (None, fp.Settings(draws=3)):
        scores = fp.score(model, [batch], "obd", settings=settings, **options)
        torch.testing.assert_close(scores["weight"], torch.tensor([[8.0, 18.0]]))


def scattered(draws, seeds, estimate):
    """Return the root mean square of errors over seeds."""
    errors = [estimate(draws, int(torch.randint(2**31, ()))) for _ in range(seeds)]
    return torch.stack(errors).square().mean().sqrt()


def test_errors_fall_as_the_root_of_the_draws():
    model, (x, y) = mlp(), data((5,), classes=C)
    options = {"parameters": {"fc": model.fc.weight, "head": model.head.weight}}
    exact = fp.gauss_newton_diagonal(model, [(x, y)], **options)

    def error(draws, seed):
        options["seed"] = seed
        found = fp.gauss_newton_estimate(model, [(x, y)], draws=draws, **options)
        return torch.cat([(found.mean[n] - d).flatten() for n, d in exact.items()])

    few, many = (scattered(draws, 6, error) for draws in (4, 64))
    assert 1.6 < few / many < 10  # 4 in expectation


@pytest.mark.parametrize("name", ["default, positions", "sequences", "regression"])
def test_neither_batches_nor_draws_before_change_a_draw(name):
    make, options = ALL[name]
    model, (x, y) = make()
    estimate = partial(fp.gauss_newton_estimate, model, draws=3, seed=4, **options)
    together, apart = (estimate(batches(x, y, size)) for size in (4, 1))
    other = fp.gauss_newton_estimate(model, [(x, y)], draws=3, seed=5, **options)
    for parameter, mean in together.mean.items():
        torch.testing.assert_close(apart.mean[parameter], mean, rtol=1e-4, atol=1e-8)
        assert not torch.equal(other.mean[parameter], mean)
    again = estimate([(x, y)])
    assert all(torch.equal(again.mean[n], m) for n, m in together.mean.items())
    settings = fp.Settings(draws=3)
    scores = fp.score(model, [(x, y)], "obd", settings=settings, seed=4, **options)
    for parameter, weight in fp.prunable_parameters(model).items():
        wanted = weight.detach().square() * together.mean[parameter] / 2
        torch.testing.assert_close(scores[parameter], wanted, rtol=1e-4, atol=1e-9)


def test_signs_have_less_noise_than_labels_where_one_class_is_rare():
    model, (x, y) = nn.Linear(1, 3, bias=False), (torch.ones(1, 1), torch.zeros(1))
    model.weight.data = torch.tensor([[6.0], [5.9], [0.0]])
    batch, options = [(x, y.long())], {"parameters": {"weight": model.weight}}
    exact = fp.gauss_newton_diagonal(model, batch, **options)["weight"]
    seeds = range(20)
    by_signs = torch.stack(
        [
            fp.gauss_newton_estimate(model, batch, draws=2, seed=s, **options).mean[
                "weight"
            ]
            for s in seeds
        ]
    )
    by_labels = torch.stack(
        [
            fp.gradient_moments(
                model, batch, labels="sampled", draws=2, seed=s, **options
            ).fisher["weight"]
            for s in seeds
        ]
    )
    rare = 2  # drawn with a probability of 1e-3: most estimates are far too small
    relative = [e[:, rare].median() / exact[rare] for e in (by_signs, by_labels)]
    assert 0.3 < relative[0] < 3 and relative[1] < 0.1


def test_scaled_losses_keep_the_estimate():
    x, y = data((5,), classes=C)
    tiny = Own(lambda m, x: m.net(x * 1e-25), net=mlp())
    options = {"settings": fp.Settings(draws=4), "seed": 1}
    scores = fp.score(tiny, [(x, y)], "obd", **options)
    assert scores["net.fc.weight"].any()
    exact = fp.score(tiny, [(x, y)], "obd")
    quotient = scores["net.fc.weight"].sum() / exact["net.fc.weight"].sum()
    assert 0.05 < quotient < 20


@dataclass
class Unhashable:
    """A loss function that is compared by value."""

    def __call__(self, outputs, labels):
        return outputs.sum()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"loss_fn": F.l1_loss}, "loss_fn must be none .cross-entropy., .* for the Ga"),
        ({"loss_fn": lambda o, y: o.sum()}, "losses=fisherprune.losses.class.*lambda"),
        ({"loss_fn": Unhashable()}, "loss_fn must be none .* got Unhashable"),
        ({"loss_fn": nn.BCEWithLogitsLoss(torch.ones(4))}, "loss_fn must be none"),
        (
            {"loss_fn": partial(F.cross_entropy, weight=WEIGHT)},
            "loss_fn must be without class weights or of reduction='sum', for the Gau",
        ),
        ({"losses": fp.losses.hugging_face}, "losses must be none .* got <function hu"),
    ],
)
def test_losses_of_which_nothing_is_known(options, match):
    model, (x, y) = mlp(), data((5,), classes=C)
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)], **options)
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.score(model, None, "obd", **options)  # before data is read


def test_outputs_that_do_not_fit_the_loss():
    model, (x, y) = mlp(), data((5,), classes=C)
    match = r"labels must be of the outputs' shape \[13, 4\], got \[13\]"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [(x, y)], F.mse_loss)
    match = r"output must be scores .* of N, \*, got \[13, 4\] and labels \[13, 2\]"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(
            model, [(x, y[:, None].expand(13, 2))], F.cross_entropy
        )


def test_too_many_classes_are_estimated():
    model = nn.Linear(2, 5000)
    batch, options = data((2,), 3, 5000), {"parameters": {"bias": model.bias}}
    match = r"of a batch must be at most 4096 .* Settings\(draws=...\), got 4999"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gauss_newton_diagonal(model, [batch], **options)
    found = fp.gauss_newton_estimate(model, [batch], draws=20, **options)
    p = model(batch[0]).softmax(1).detach()
    wanted = (p * (1 - p)).mean(0)
    assert abs(found.mean["bias"].sum() / wanted.sum() - 1) < 0.2


def test_draws_that_can_not_be():
    model, (x, y) = conv_net(), data((3, 9, 9))
    for draws in (1, 2.0, True):
        match = f"draws must be an integer of at least 2, got {draws}"
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.gauss_newton_estimate(model, [(x, y)], draws=draws)
    for name in ("draws", "probes"):
        match = f"{name} must be an integer of at least 1, got 0"
        with pytest.raises(fp.FisherpruneError, match=match):
            fp.Settings(**{name: 0})
