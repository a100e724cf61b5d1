"""Scores that do not decide which weights are kept."""

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherprune as fp
from fisherprune.masks.devices import select_over_devices


def tied(tensors, keep):
    """Say from sorted scores whether position decides too much."""
    ordered = torch.cat([t.flatten() for t in tensors.values()]).sort().values.flip(0)
    n = len(ordered)
    if not 0 < keep < n:
        return False
    threshold = ordered[keep - 1]
    kept = int((ordered[:keep] == threshold).sum())
    removed = int((ordered[keep:] == threshold).sum())
    some = max(10, keep // 20 + 1)
    return min(kept, removed) >= some or kept + removed == n


@settings(deadline=None)
@given(
    st.integers(1, 400), st.integers(0, 400), st.integers(1, 40), st.integers(0, 460)
)
def test_ties_are_refused_where_they_decide(n, zeros, values, keep):
    tensors = {
        "a": torch.cat([torch.randn(n), torch.zeros(zeros)]),
        "b": torch.randint(-values, values + 1, (60,)) / 4,
    }
    total = n + zeros + 60
    keep = max(1, min(keep, total))
    sparsity = 1 - keep / total
    wanted = truth.keep_largest(tensors, keep)
    found = fp.select_masks(tensors, sparsity, ties="position")
    assert all(torch.equal(found[name], wanted[name]) for name in tensors)
    if tied(tensors, keep):
        for choose in (
            lambda: fp.select_masks(tensors, sparsity),
            lambda: fp.select_masks(tensors, [0.0, sparsity]),
            lambda: select_over_devices(tensors, keep, "error"),
        ):
            with pytest.raises(fp.FisherpruneError, match="scores must decide which"):
                choose()
    else:
        assert fp.select_masks(tensors, sparsity) == found
        assert found == select_over_devices(tensors, keep, "error")


@pytest.mark.parametrize("keep", [30, 199, 200, 400])
def test_how_many_ties_decide(keep):
    """More than a twentieth of the kept weights and at least 10, on either side."""
    some = {30: 10, 199: 10, 200: 11, 400: 21}[keep]
    for kept, removed in ((some, some), (some - 1, some), (some, some - 1)):
        above, below = torch.rand(keep - kept) + 2, torch.rand(500)
        scores = {"a": torch.cat([above, below, torch.ones(kept + removed)])}
        options = {"sparsity": 1 - keep / scores["a"].numel()}
        if (kept, removed) == (some, some):
            with pytest.raises(fp.FisherpruneError, match="scores must decide"):
                fp.select_masks(scores, **options)
        else:
            assert fp.select_masks(scores, **options).kept() == keep


def test_the_message_names_the_parameters_with_the_most_ties():
    scores = {"a": torch.rand(100), "b": torch.zeros(2000), "c": torch.zeros(3000)}
    with pytest.raises(
        fp.FisherpruneError,
        match=r"but 5,000 equal scores of 0 compete for 2,450 places, most of them in "
        r"'c' \(3,000\), 'b' \(2,000\): such are .* ties=.position. keeps the first",
    ):
        fp.select_masks(scores, 0.5)
    with pytest.raises(fp.FisherpruneError, match="compete for 2,450 places"):
        fp.select_masks(scores, [0.99, 0.5, 0.6])  # the first that ties decide
    assert fp.select_masks(scores, 0.99).kept() == 51  # decided by the others
    for scope in ("layer", "erk"):
        with pytest.raises(fp.FisherpruneError, match="in 'c' .3,000., 'b' .2,000.:"):
            fp.select_masks(scores, 0.5, scope)
        masks = fp.select_masks(scores, 0.5, scope, ties="position")
        assert masks["b"][: int(masks["b"].sum())].all()


def test_scores_that_tie_and_decide():
    """Rounding, masks from before, scores of a whole layer, all or nothing kept."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, generator=generator) ** 2
    for power in (1, 4):
        rounded = {"a": (scores**power).bfloat16()}
        for sparsity in (0.5, 0.8, 0.9, 0.98, 0.999):
            fp.select_masks(rounded, sparsity)
    masked = scores * (torch.rand(200_000, generator=generator) < 0.4)
    fp.select_masks({"a": masked}, [0.7, 0.9])
    fp.select_masks({"a": torch.zeros(1000), "b": torch.rand(9000)}, 0.5)
    fp.select_masks({"a": torch.rand(500).repeat(2)}, 0.499)
    fp.select_masks({"a": torch.zeros(1000)}, 0.0)
    fp.select_masks({"a": torch.zeros(0), "b": torch.rand(5)}, 0.5, "layer")
    fp.select_masks({"a": torch.rand(1000), "b": torch.ones(20)}, 1.0)
