"""Cross-entropies of samples against their formulas, one float64 sample at a time."""

from functools import partial

import pytest
import torch
from checks import assert_losses
from torch import nn

import fisherprune as fp
from fisherprune.losses import classification, next_token, sequences


class ByName(nn.Module):
    """Scores of tokens as an object's logits; called by keywords alone."""

    def __init__(self, vocabulary=7):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 5)
        self.head = nn.Linear(5, vocabulary)

    def forward(self, *, input_ids, attention_mask=None, scale=1.0):
        output = nn.Module()
        output.logits = self.head(torch.tanh(self.embed(input_ids).cumsum(1))) * scale
        return output


def minus_logs(scores):
    """Return -log p of the classes, ``[..., C]``."""
    return torch.logsumexp(scores, -1, keepdim=True) - scores


def mean_or_sum(terms, reduction):
    if not terms:
        return torch.zeros((), dtype=torch.float64)
    return sum(terms) / (len(terms) if reduction == "mean" else 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("positions", [(), (4,), (2, 3)])
def test_classification_is_its_formula(weighted, smoothing, positions):
    kinds = [nn.Linear, partial(nn.Conv1d, kernel_size=1)]
    kinds += [partial(nn.Conv2d, kernel_size=1)]
    model = kinds[len(positions)](3, 5)
    weight = torch.rand(5) + 0.1 if weighted else None
    batch = torch.randn(6, 3, *positions), torch.randint(5, (6, *positions))

    def expected(model, one):
        scores, labels = model(one[0])[0].view(5, -1).T, one[1].flatten()
        w = torch.ones(5).double() if weight is None else weight.double()
        terms = []
        for s, c in zip(scores, labels, strict=True):
            target = torch.full((5,), smoothing / 5, dtype=torch.float64)
            target[c] += 1 - smoothing
            terms.append((w * target * minus_logs(s)).sum())
        return mean_or_sum(terms, "mean")

    losses = partial(classification, label_smoothing=smoothing, weight=weight)
    assert_losses(losses, model, batch, expected)


def test_weights_of_classes_do_not_cancel():
    model, weight = nn.Linear(3, 4), torch.rand(4) + 0.5
    x, y = torch.randn(9, 3), torch.randint(4, (9,))
    plain = classification(model, (x, y))
    found = classification(model, (x, y), weight=weight)
    torch.testing.assert_close(found, plain * weight[y])


def test_labels_may_be_probabilities():
    x, y = torch.randn(6, 3), torch.randn(6, 4).softmax(1)
    assert_losses(
        classification,
        nn.Linear(3, 4),
        (x, y),
        lambda model, one: (one[1] * minus_logs(model(one[0]))).sum(),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_any_integers(dtype):
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(2, (6,))
    expected = classification(model, (x, y))
    assert classification(model, (x, y.to(dtype))).equal(expected)


def test_pixels_that_are_ignored():
    model, x, y = nn.Conv2d(3, 4, 1), torch.randn(5, 3, 6, 6), torch.randint(4, (5, 36))
    y[1, 7:], y[2] = 255, 255  # few count, none counts

    def expected(model, one):
        scores, labels = model(one[0])[0].flatten(1).T, one[1].flatten()
        pairs = zip(scores, labels, strict=True)
        terms = [minus_logs(s)[c] for s, c in pairs if c != 255]
        return mean_or_sum(terms, "mean")

    losses = partial(classification, ignore_index=255)
    assert_losses(losses, model, (x, y.view(5, 6, 6)), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sequences_count_their_own_positions(reduction):
    model = ByName()
    labels = torch.randint(7, (6, 5))
    labels[torch.rand(6, 5) < 0.4] = -100
    labels[2] = -100
    batch = {"input_ids": torch.randint(7, (6, 5)), "labels": labels, "scale": 2.0}

    def expected(model, one):
        (scores,) = model(input_ids=one["input_ids"], scale=2.0).logits
        pairs = zip(scores, one["labels"][0], strict=True)
        terms = [minus_logs(s)[c] for s, c in pairs if c != -100]
        return mean_or_sum(terms, reduction)

    assert_losses(partial(sequences, reduction=reduction), model, batch, expected)
    assert sequences(model, batch)[2] == 0


def test_uneven_counts_are_not_the_batch_mean_and_this_is_said():
    """A batch's mean over its counted positions is not the mean of samples' means."""
    model = nn.Linear(3, 4)
    x, labels = torch.randn(2, 6, 3), torch.zeros(2, 6, dtype=torch.long)
    with torch.no_grad():
        model.bias += torch.tensor([9.0, 0, 0, 0])
    labels[1, 1:], labels[1, 0] = -100, 1  # one position, of a far greater loss

    def flat(outputs, labels):
        return nn.functional.cross_entropy(outputs.mT, labels)

    options = {"parameters": dict(model.named_parameters())}
    with pytest.warns(fp.FisherpruneWarning, match="class weights or number of posit"):
        moments = fp.gradient_moments(model, [(x, labels)], flat, **options)
    means = sequences(model, (x, labels))
    (mean,) = torch.autograd.grad(means.mean(), model.weight)
    torch.testing.assert_close(moments.mean["weight"], mean)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given", ["labels", "mask", "both", "neither"])
def test_next_tokens_are_predicted(given, reduction):
    model, ids = ByName(), torch.randint(7, (6, 5))
    batch = {"input_ids": ids}
    if given in ("labels", "both"):
        batch["labels"] = ids.masked_fill(torch.rand(6, 5) < 0.3, -100)
    if given in ("mask", "both"):
        lengths, t = torch.arange(6)[:, None], torch.arange(5)
        batch["attention_mask"] = (t < lengths).long()

    def expected(model, one):
        (scores,) = model(input_ids=one["input_ids"]).logits
        labels, mask = one.get("labels", one["input_ids"]), one.get("attention_mask")
        terms = []
        for t in range(4):
            real = mask is None or mask[0, t] and mask[0, t + 1]
            if real and labels[0, t + 1] != -100:
                terms.append(minus_logs(scores[t])[labels[0, t + 1]])
        return mean_or_sum(terms, reduction)

    assert_losses(partial(next_token, reduction=reduction), model, batch, expected)


def test_the_padding_plays_no_part():
    """Neither its side nor its length, where a position reads itself alone."""
    model = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 7))
    model.forward = lambda input_ids, attention_mask=None: nn.Sequential.forward(
        model, input_ids
    )
    ids, pad = torch.randint(1, 7, (4, 5)), torch.zeros(4, 3, dtype=torch.long)
    real = torch.ones_like(ids)
    bare = next_token(model, {"input_ids": ids})
    for order in (lambda *parts: parts, lambda *parts: parts[::-1]):
        padded = torch.cat(order(ids, pad), 1)
        mask = torch.cat(order(real, pad), 1)
        found = next_token(model, {"input_ids": padded, "attention_mask": mask})
        torch.testing.assert_close(found, bare)


def test_next_tokens_of_pairs():
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))
    ids = torch.randint(7, (6, 5))
    shifted = torch.cat([ids[:, 1:], torch.full((6, 1), -100)], 1)
    found = next_token(model, [ids, ids])
    torch.testing.assert_close(found, sequences(model, (ids, shifted)))


def test_half_precision_scores_are_read_as_float():
    model, x = nn.Linear(3, 4).bfloat16(), torch.randn(6, 3).bfloat16()
    found = classification(model, (x, torch.randint(4, (6,))))
    assert found.dtype == torch.float32


X, CLASSES = torch.randn(6, 3), torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    "losses, batch, match",
    [
        (classification, (X, 3), r"a batch must be a pair .*got tuple of \(Tensor"),
        (classification, (X,), "a batch must be a pair"),
        (classification, {"x": X}, r"\"labels\", .* got dict of \(x: Tensor \[6, 3\]"),
        (
            classification,
            (X, CLASSES[:2]),
            r"the batch's 2 samples .*got Tensor \[6, 4",
        ),
        (classification, (X, X), r"must be probabilities \[N, classes, \*\], at le"),
        (classification, (X, torch.eye(4)[:3].repeat(2, 1) * 2), "at least 0 with sum"),
        (classification, (X, torch.tensor([[2.0, -1, 0, 0]] * 6)), "at least 0 with"),
        (
            classification,
            (X, CLASSES[:, None]),
            r"class numbers \[N, \*\] .* int64 \[6",
        ),
        (classification, (X, CLASSES + 4), r"must lie in \[0, 4\), .*, got 4 to 4"),
        (classification, (X, CLASSES - 100), "must lie in .* got -100 to -100"),
        (partial(classification, label_smoothing=2), (X, CLASSES), "in .0, 1., got 2"),
        (partial(classification, weight=X[0]), (X, CLASSES), "each of the 4 classes"),
        (partial(classification, weight=[1] * 4), (X, CLASSES), "each of the 4 classe"),
        (
            sequences,
            (X, CLASSES),
            r"must be \[N, T, V\] .* got outputs \[6, 4\] and la",
        ),
        (next_token, (X, CLASSES), r"next_token: outputs must be \[N, T, V\]"),
        (sequences, (X[:, None], X[:, :1]), "labels integers"),
        (sequences, (X[:, None], CLASSES[:, None] - 1), "or be -100, got -1 to -1"),
        (
            partial(sequences, reduction="none"),
            (X[:, None], CLASSES[:, None]),
            "sequences: reduction must be 'mean' or 'sum', got 'none'",
        ),
    ],
)
def test_what_is_refused(losses, batch, match):
    with pytest.raises(fp.FisherpruneError, match=match):
        losses(nn.Linear(3, 4), batch)


def test_one_class_has_no_cross_entropy():
    with pytest.raises(fp.FisherpruneError, match=r"at least two .* outputs \[6, 1\]"):
        classification(nn.Linear(3, 1), (X, CLASSES))


@pytest.mark.parametrize("mask, got", [(torch.ones(6, 2), "Tensor .6, 2."), (1, "int")])
def test_masks_of_another_shape(mask, got):
    batch = {"input_ids": torch.randint(7, (6, 5)), "attention_mask": mask}
    match = rf"attention_mask must be .* shape \[6, 5\], got {got}"
    with pytest.raises(fp.FisherpruneError, match=match):
        next_token(ByName(), batch)


def test_outputs_without_scores():
    model = nn.Linear(3, 4)
    model.forward = lambda x: (x, None)
    match = r"must return a tensor, or an object .* got tuple of \(Tensor \[6, 3\], Non"
    with pytest.raises(fp.FisherpruneError, match=match):
        classification(model, (X, CLASSES))
