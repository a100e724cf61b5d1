import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from fisherprune.runs.metrics import Meter


@pytest.mark.parametrize("classes, present", [(10, 10), (10, 4), (2, 2), (100, 90)])
def test_against_scikit_learn_over_uneven_batches(classes, present):
    g = torch.Generator().manual_seed(classes + present)
    labels = torch.randint(present, (137,), generator=g)
    logits = torch.randn(137, classes, generator=g) + F.one_hot(labels, classes)
    meter = Meter(classes, torch.device("cpu"))
    for x, y in zip(logits.split(50), labels.split(50), strict=True):
        meter.update(F.cross_entropy(x, y), x, y)
    metrics = meter.compute()

    predicted = logits.argmax(1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=range(classes), average="macro", zero_division=0
    )
    got = (metrics.precision, metrics.recall, metrics.f1, metrics.accuracy)
    expected = (precision, recall, f1, accuracy_score(labels, predicted))
    assert got == pytest.approx(expected, rel=1e-12)
    assert len({round(value, 9) for value in got}) >= 3  # they are told apart
    truth = F.cross_entropy(logits.double(), labels).item()
    assert metrics.loss == pytest.approx(truth, rel=1e-6)


def test_a_loss_that_is_not_finite_shows():
    meter = Meter(2, torch.device("cpu"))
    logits = torch.tensor([[0.0, np.nan]])
    meter.update(torch.tensor(np.nan), logits, torch.tensor([0]))
    assert np.isnan(meter.compute().loss)
