"""Calls without a rule, which run with a copy of the weight for each sample."""

import gc

import pytest
import torch
import truth
from checks import assert_moments
from layer_calls import drawn
from nets import Own
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

import fisherprune as fp
from fisherprune.losses import classification
from fisherprune.persample import call_tap

CLASSES = 5


def given(*sizes):
    return [(torch.randn(n, 3, 8), torch.randint(CLASSES, (n,))) for n in sizes]


def assert_right(model, batches, sizes=None, refused=0):
    expected = truth.moments_of_losses(model, batches, ["w"], classification, [1])
    if sizes is not None:
        sizes.noted, sizes.refused = [], refused
    found = fp.gradient_moments(model, batches, parameters={"w": model.w})
    assert_moments(found, expected[1])
    assert found.paths["w"] == ("vmap",)


def test_what_vmap_can_not_run_is_tried_once(monkeypatch):
    tried, run = [], call_tap.run_with_copies

    def counted(*arguments):
        tried.append(run(*arguments))
        return tried[-1]

    monkeypatch.setattr(call_tap, "run_with_copies", counted)
    model = Own(
        lambda m, x: torch.cdist(x, m.w).mean(1)[:, :CLASSES],
        w=drawn(30, 8),  # of at least 26 rows, distances are products
    )
    assert_right(model, given(4, 4, 4))
    assert tried == [None]


def larger(x, w, shape, sizes):
    """Return the larger ones, and note the number of samples."""
    if has_torch_function((x, w)):
        return handle_torch_function(larger, (x, w), x, w, shape, sizes)
    sizes.noted.append(len(x))
    if len(x) == sizes.refused:
        raise ValueError("as many samples are refused")
    return torch.maximum(x, w)


class Sizes:
    """The numbers of samples in calls: of 1 for each sample that vmap runs."""

    def __init__(self):
        self.noted, self.refused = [], 0


def model_of(sizes, tells_shape=False):
    def forward(m, x):
        shape = x.shape if tells_shape else None
        return larger(x, m.w, shape, sizes).mean(1)[:, :CLASSES]

    return Own(forward, w=drawn(3, 8))


def test_two_samples_show_where_they_are_in_a_result():
    sizes = Sizes()
    assert_right(model_of(sizes), given(6, 6), sizes)
    assert sizes.noted == [1, 2, 1, 1]  # alone, two, and both batches by vmap
    assert_right(model_of(Sizes()), given(6, 6, 2, 1))


@pytest.mark.parametrize("tells_shape, first", [(True, [1]), (False, [1, 2])])
def test_what_needs_all_samples_gets_them(tells_shape, first):
    sizes = Sizes()
    assert_right(model_of(sizes, tells_shape), given(6, 6), sizes, refused=2)
    assert sizes.noted == [*first, 6, 1, 1]


def test_no_cycle_keeps_a_tensor():
    model = Own(lambda m, x: torch.maximum(x, m.w).mean(1)[:, :CLASSES], w=drawn(3, 8))
    batches = given(4, 4)
    fp.gradient_moments(model, batches, parameters={"w": model.w})
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        fp.gradient_moments(model, batches, parameters={"w": model.w})
        gc.collect()
        assert not any(type(each) is Tensor for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
