"""The examples: they run, and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch
from mask_cases import assert_zero_where_pruned, scores_of
from pattern_truth import keep_units

from fisherprune.masks.masks import Masks

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """Return what an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_has_its_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    for path in EXAMPLES.glob("[!_]*.py"):
        assert f'example("{path.stem}")' in tests


def test_rigl_trains_with_masks_that_change():
    model, masks, accuracy = example("rigl")["main"]()
    assert accuracy > 0.9
    assert masks.sparsity() == pytest.approx(0.8, abs=0.05)
    assert_zero_where_pruned(model, masks)


def test_rigl_drops_the_smallest_and_grows_by_gradient():
    rewired = example("rigl")["rewired"]
    weights, gradients = scores_of((9, 4), (30,)), scores_of((9, 4), (30,))
    masks = Masks({n: torch.rand(w.shape) < 0.5 for n, w in weights.items()})
    found = rewired(masks, weights, gradients, 0.4)
    for name, mask in masks.items():
        kept = int(mask.sum())
        k = int(0.4 * kept)
        (stay,) = keep_units(
            {name: weights[name].abs()}, "weights", kept - k, among={name: mask}
        ).values()
        (grown,) = keep_units(
            {name: gradients[name].abs()}, "weights", k, among={name: ~stay}
        ).values()
        assert torch.equal(found[name], stay | grown) and int(found[name].sum()) == kept
    assert rewired(masks, weights, gradients, 0.0) == masks


def test_rigl_grows_by_gradients_that_a_hold_does_not_mask():
    dense_gradients = example("rigl")["dense_gradients"]
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    mask = torch.rand(3, 4) < 0.5
    with Masks({"0.weight": mask}).hold(model):
        weights = {"0.weight": model[0].weight}
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        (found,) = dense_gradients(model, weights, x, y).values()
    error = model(x).softmax(1) - torch.nn.functional.one_hot(y, 3)
    torch.testing.assert_close(found, error.detach().T @ x / 6)


def test_gradual_prunes_more_in_every_round():
    model, rounds, accuracy = example("gradual")["main"]()
    assert accuracy > 0.85
    assert_zero_where_pruned(model, rounds[-1])
    assert [round(m.sparsity(), 3) for m in rounds] == [0, 0.633, 0.867, 0.9]
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert (after & ~before).kept() == 0
