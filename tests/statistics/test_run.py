"""Statistics with and without a cache, and the formulas applied to them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from nets import batches, conv_net
from torch import nn

import fisherprune as fp
from fisherprune.scoring.score import needs_of, score_from
from fisherprune.statistics import run as passes
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.run import ModelStatistics, statistics_of

PASSES = ["gradient_moments", "hessian_gradient_product", "gauss_newton_pass"]
CODES = [code for code in fp.criteria() if code != "none"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data():
    return batches(torch.randn(13, 3, 9, 9), torch.randint(5, (13,)), 5)


@pytest.fixture
def runs(monkeypatch):
    """Name the passes that are run, in order."""
    names = []
    for name in PASSES:
        run = getattr(passes, name)
        monkeypatch.setattr(
            passes,
            name,
            lambda *a, _run=run, _name=name, **k: (names.append(_name), _run(*a, **k))[
                1
            ],
        )
    return names


def test_cached_scores_are_the_same_bits(data, tmp_path, runs):
    model = conv_net()
    plain = fp.score_all(model, data, CODES, group_size=2, seed=3)
    runs.clear()
    for _ in range(2):
        cache = StatisticsCache(tmp_path)
        found = statistics_of(model, data, needs_of(CODES), group_size=2, cache=cache)
        scores = score_from(fp.prunable_parameters(model), found, CODES, seed=3)
        for code in CODES:
            for name, s in plain[code].items():
                assert torch.equal(scores[code][name], s), (code, name)
    assert runs == PASSES
    assert found.cached and found.samples == 13 and found.moments.groups == 7


def test_second_order_after_others_runs_one_pass_more(data, tmp_path, runs):
    model, cache = conv_net(), StatisticsCache(tmp_path)
    first = statistics_of(model, data, ["moments"], cache=cache)
    more = statistics_of(model, data, needs_of(["grasp"]), cache=cache)
    again = statistics_of(model, data, needs_of(["fts", "grasp"]), cache=cache)
    curved = statistics_of(model, data, needs_of(["obd"]), cache=cache)
    assert runs == PASSES
    assert [f.cached for f in (first, more, again)] == [False, False, True]
    assert more.seconds > first.seconds > 0 and again.seconds == more.seconds
    assert sorted(again.kinds) == ["hessian", "moments"] and first.products is None
    assert sorted(curved.kinds) == ["gauss_newton"] and not curved.cached


def test_other_data_and_other_arguments_run_anew(data, tmp_path, runs):
    model, cache = conv_net(), StatisticsCache(tmp_path)
    for options in ({}, {"group_size": 2}, {"parameters": {"p": model[0].weight}}):
        statistics_of(model, data, ["moments"], cache=cache, **options)
    statistics_of(model, data[1:], ["moments"], cache=cache)
    statistics_of(conv_net(), data, ["moments"], cache=cache)
    assert len(runs) == len(list(tmp_path.iterdir())) == 5


def test_weights_that_changed_run_anew(data, tmp_path):
    model, cache = conv_net(), StatisticsCache(tmp_path)
    statistics_of(model, data, ["moments"], cache=cache)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    found = statistics_of(model, data, ["moments"], cache=cache).moments
    wanted = fp.gradient_moments(model, data)
    for name, fisher in wanted.fisher.items():
        assert torch.equal(found.fisher[name], fisher)
        assert torch.equal(found.mean[name], wanted.mean[name])


@pytest.mark.parametrize("cached", [False, True])
def test_data_that_can_be_read_only_once(data, tmp_path, cached):
    model, cache = conv_net(), StatisticsCache(tmp_path) if cached else None
    once = statistics_of(model, iter(data), ["hessian"], cache=cache)
    again = statistics_of(model, data, ["hessian", "moments"])
    for name, product in again.products.items():
        assert torch.equal(once.products[name], product)


CODE = """
class Net(nn.Sequential):
    def forward(self, x):
        return {forward}
"""


def test_models_that_cannot_be_read_are_not_kept(tmp_path, runs, capsys):
    data = [(torch.randn(7, 4), torch.randint(5, (7,)))]
    cache, layers = StatisticsCache(tmp_path), [nn.Linear(4, 4), nn.Linear(4, 5)]
    for forward in ("self[1](self[0](x))", "self[1](self[0](x).relu())"):
        names = {"nn": nn, "__name__": __name__}
        exec(CODE.format(forward=forward), names)
        model = names["Net"](*layers)
        found = statistics_of(model, data, ["hessian"], cache=cache)
        wanted = fp.gradient_moments(model, data)
        assert not found.cached
        assert torch.equal(found.moments.fisher["0.weight"], wanted.fisher["0.weight"])
        assert "statistics are not kept, for the model holds" in capsys.readouterr().err
    assert len(runs) == 4 and list(tmp_path.iterdir()) == []


def test_settings_of_an_object_run_anew(data, tmp_path):
    cache, found = StatisticsCache(tmp_path), []
    model = conv_net()
    for slope in (0.1, 0.9):
        model[6] = Through(functools.partial(F.leaky_relu, negative_slope=slope))
        found.append(statistics_of(model, data, ["moments"], cache=cache))
        again = statistics_of(model, data, ["moments"], cache=cache)
        assert not found[-1].cached and again.cached
    one, other = (f.moments.fisher["0.weight"] for f in found)
    assert not torch.equal(one, other)


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_data_free_criteria_read_nothing(tmp_path):
    def unread():
        raise AssertionError("the data was read")
        yield

    model, cache = conv_net(), StatisticsCache(tmp_path)
    needs = needs_of(["random", "magnitude"])
    found = statistics_of(model, unread(), needs, cache=cache)
    assert found == ModelStatistics() and (found.seconds, found.samples) == (0, 0)
    assert not found.cached and list(tmp_path.iterdir()) == []


def test_mistakes(data, tmp_path):
    model, cache = conv_net(), StatisticsCache(tmp_path)
    parameters = fp.prunable_parameters(model)
    with pytest.raises(
        fp.FisherpruneError, match="needs must be of moments, hessian, g"
    ):
        statistics_of(model, data, ["gradient"])
    with pytest.raises(fp.FisherpruneError, match="loss_fn must be left out where a"):
        statistics_of(model, data, ["moments"], loss_fn=torch.dot, cache=cache)
    with pytest.raises(fp.FisherpruneError, match="must be left out for the Gauss"):
        statistics_of(model, data, needs_of(["obd"]), loss_fn=torch.dot)
    with pytest.raises(fp.FisherpruneError, match="group_size must be"):
        statistics_of(model, data, ["moments"], group_size=0, cache=cache)
    found = statistics_of(model, data, ["moments"])
    with pytest.raises(
        fp.FisherpruneError, match=r"for grasp must hold hessian, got \['moments'\]"
    ):
        score_from(parameters, found, ["fts", "grasp"])
    with pytest.raises(fp.FisherpruneError, match="dense baseline"):
        needs_of(["fts", "none"])
