"""The recipes: what can be done with a Fisher diagonal, and with parts of one's own."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from mask_cases import assert_zero_where_pruned
from torch import nn

import fisherprune as fp
from fisherprune.scoring.criteria import CRITERIA

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, one_thread):
    """Return a function that returns what an example defines."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_elastic_weight_consolidation_keeps_the_first_task(example):
    found = example("elastic_weight_consolidation")["main"]()
    assert found["first task"][0] > 0.9
    plain, kept = found["then second"], found["then second, EWC"]
    assert kept[0] > plain[0] + 0.2
    assert min(plain[1], kept[1]) > 0.8


def test_the_penalty_of_elastic_weight_consolidation(example):
    model = nn.Linear(4, 3).double()
    fisher = {"weight": torch.rand(3, 4).double()}
    penalty = example("elastic_weight_consolidation")["consolidation"](model, fisher, 6)
    assert penalty(model) == 0
    step = torch.randn(3, 4).double()
    with torch.no_grad():
        model.weight += step
        model.bias += 1  # of which no F is known
    penalty(model).backward()
    torch.testing.assert_close(penalty(model), 3 * (fisher["weight"] * step**2).sum())
    torch.testing.assert_close(model.weight.grad, 6 * fisher["weight"] * step)


def test_fisher_merging_reports_all_models(example):
    found = example("fisher_merging")["main"]()
    alone = max(found["tuned on 0-4"], found["tuned on 5-9"])
    assert found["Fisher average"] > alone + 0.1
    assert found["plain average"] > alone + 0.1


def test_fisher_merging_minimizes_both_quadratic_losses(example):
    models = [nn.Linear(4, 3) for _ in range(2)]
    fishers = [
        {n: torch.rand(p.shape) for n, p in m.named_parameters()} for m in models
    ]
    found = example("fisher_merging")["merged"](models, fishers)
    for name, weight in found.named_parameters():
        slopes = [
            f[name] * (weight - m.get_parameter(name))
            for f, m in zip(fishers, models, strict=True)
        ]
        torch.testing.assert_close(slopes[0], -slopes[1], atol=1e-6, rtol=1e-4)
    zero = {name: torch.zeros_like(f) for name, f in fishers[0].items()}
    plain = example("fisher_merging")["merged"](models, [zero, zero])
    expected = (models[0].weight + models[1].weight) / 2
    torch.testing.assert_close(plain.weight, expected)


def test_the_laplace_posterior_is_less_sure_of_noise(example):
    found = example("diagonal_laplace")["main"]()
    assert found["test accuracy"] > 0.95
    for one, mean in found.values() if found.pop("test accuracy") else ():
        assert 0 < one < mean
    gains = {what: mean - one for what, (one, mean) in found.items()}
    assert gains["entropy, noise"] > gains["entropy, test"] + 0.05


def test_laplace_averages_over_the_posterior(example):
    model, x = nn.Linear(1, 2), torch.ones(1, 1)
    model.bias.data = torch.tensor([2.5, -1.0])
    before = copy.deepcopy(model.state_dict())
    variance = torch.tensor([4.0, 9.0, 1.0, 2.0])
    found = example("diagonal_laplace")["averaged"](model, variance, x, 20000)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    # the difference of both outputs is normal, of the variances' sum: integrate
    grid = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    out = model(x).detach().double().flatten()
    density = torch.distributions.Normal(out[0] - out[1], 4.0).log_prob(grid).exp()
    expected = float((grid.sigmoid() * density).sum() / density.sum())
    assert float(found[0, 0]) == pytest.approx(expected, abs=0.02)


def test_sensitivity_is_predicted(example):
    found = example("layer_sensitivity")["main"]()
    assert len(found) == 4
    for predicted, measured in found.values():
        assert predicted == pytest.approx(measured, rel=0.5, abs=2e-3)
    order = sorted(found, key=found.get)
    assert order[-1] == max(found, key=lambda name: found[name][1])


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_are_rounded_to_as_many_values_as_there_are_bits(example, bits):
    weight = torch.randn(50, 60)
    found = example("layer_sensitivity")["rounded"](weight, bits)
    assert len(found.unique()) <= 2**bits
    step = found.unique().diff().min()
    assert float((found - weight).abs().max()) <= float(step) / 2 * 1.001


def test_dead_weights_change_no_output_when_they_move(example):
    masks, small, large, before, after = example("dead_weights")["main"]()
    assert 0 < masks.kept() < sum(m.numel() for m in masks.values())
    assert small == 0 and large < 1
    assert min(before, after) > 0.9


def test_a_criterion_of_ones_own(example):
    try:
        defined = example("own_criterion")
        found = defined["main"]()
        assert found["steady"] > found["random"] + 0.3
        w, m, F = torch.randn(9), torch.randn(9), torch.rand(9)
        F[3] = 0
        score = defined["steady"](fp.scoring.criteria.Statistics(w, m=m, F=F))
        expected = [
            abs(a * b) / c**0.5 if c else 0
            for a, b, c in zip(w.tolist(), m.tolist(), F.tolist(), strict=True)
        ]
        torch.testing.assert_close(score, torch.tensor(expected))
    finally:
        CRITERIA.pop("steady", None)


def test_a_layer_of_ones_own(example):
    before, after, fisher, loop = example("own_layer")["main"]()
    assert (before, after) == (("vmap",), ("gated",))
    torch.testing.assert_close(fisher, loop)
    assert fisher.min() > 0


def test_a_pruned_vision_transformer(example):
    pytest.importorskip("torchvision")
    model, masks, accuracy = example("prune_vit")["main"]()
    assert accuracy > 0.6
    assert masks.sparsity() == pytest.approx(0.8, abs=1e-3)
    assert sum("in_proj_weight" in name for name in masks) == 2
    assert_zero_where_pruned(model, masks)


def test_a_pruned_language_model(example):
    pytest.importorskip("transformers")
    model, masks, before, after = example("prune_gpt")["main"]()
    assert before > 4.5 and after < 3.5
    assert masks.sparsity() == pytest.approx(0.7, abs=1e-3)
    assert_zero_where_pruned(model, masks)


def test_moments_in_training_averages_what_a_pass_finds(example):
    found, ours, of_batches = example("moments_in_training")["main"]()
    assert found > 0.9
    assert ours > of_batches > 0


def test_a_running_average_forgets(example):
    averaged = example("moments_in_training")["averaged"]
    average = {}
    for fisher in (4.0, 1.0, 2.0):
        average = averaged(average, {"weight": torch.full((2,), fisher)}, 0.5)
    assert average["weight"].tolist() == [1.75, 1.75]
