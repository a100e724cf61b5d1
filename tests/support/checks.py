"""What tests of the passes ask again and again."""

from __future__ import annotations

import pytest
import torch
import truth

import fisherprune as fp
from fisherprune.statistics.structure import (
    count_samples,
    map_tensors,
    some_samples,
)


def assert_moments(found, expected, tolerance=1e-5):
    """Compare moments with {name: (m, F)}, each by the norm of its error.

    That of the mean, in which samples may cancel out, relative to their root mean
    square.
    """
    for name, (mean, fisher) in expected.items():
        error = float((found.mean[name].double() - mean).detach().norm())
        assert error <= tolerance * float(fisher.sum().sqrt()), name
        assert truth.relative_error(found.fisher[name], fisher) < tolerance, name


def refused(model, x, y, match, **options):
    """Expect an error of the pass over one batch."""
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.gradient_moments(model, [(x, y)], **options)


def assert_losses(losses, model, batch, expected):
    """Compare losses and their gradients with a function of single float64 samples.

    Args:
        losses: ``(model, batch) -> [N]``.
        model: float32.
        batch: of any structure.
        expected: ``(float64 model, batch of one sample) -> scalar``.
    """
    found, double = losses(model, batch), truth.in_double(model)
    assert found.shape == (count_samples(batch),)
    for i, loss in enumerate(found):
        one = some_samples(batch, slice(i, i + 1))
        true = expected(double, map_tensors(_doubled, one))
        torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
        (alone,) = losses(model, one)
        torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(_grads(loss, model), _grads(true, double), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


def _doubled(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def _grads(loss, model):
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in model.parameters()]
    return torch.autograd.grad(
        loss, [*model.parameters()], retain_graph=True, materialize_grads=True
    )
