"""Statistics with and without a cache, and the formulas applied to them."""

from dataclasses import replace

import pytest
import torch
from nets import batches, conv_net

import fisherprune as fp
from fisherprune.scoring.score import needs_of, score_from, scoring_criteria
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.passes import (
    PASSES,
    ModelStatistics,
    Task,
    checked_task,
    register_pass,
)
from fisherprune.statistics.run import statistics_of

CODES = [code for code in fp.criteria() if code != "none"]
ALL = scoring_criteria(CODES)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data():
    return batches(torch.randn(13, 3, 9, 9), torch.randint(5, (13,)), 5)


@pytest.fixture
def runs(monkeypatch):
    """Name the passes that are run, in order."""
    names = []

    def spy(each):
        return lambda task: (names.append(each.name), each.run(task))[1]

    for name, each in PASSES.items():
        monkeypatch.setitem(PASSES, name, replace(each, run=spy(each)))
    return names


def needs(*codes):
    return needs_of(scoring_criteria(codes))


def test_cached_scores_are_the_same_bits(data, tmp_path, runs):
    model = conv_net()
    plain = fp.score_all(model, data, CODES, group_size=2, seed=3)
    task = checked_task(model, data, None, group_size=2)
    runs.clear()
    for _ in range(2):
        cache = StatisticsCache(tmp_path)
        found = statistics_of(task, needs_of(ALL), cache=cache, key="k")
        scores = score_from(task.parameters, found, ALL, seed=3)
        for code in CODES:
            for name, s in plain[code].items():
                assert torch.equal(scores[code][name], s), (code, name)
    assert sorted(runs) == ["gauss_newton", "hessian", "moments"]
    assert found.cached and (found.samples, found.groups) == (13, 7)


def test_second_order_after_others_runs_one_pass_more(data, tmp_path, runs):
    task, options = checked_task(conv_net(), data, None), {"key": "k"}
    options["cache"] = StatisticsCache(tmp_path)
    first = statistics_of(task, ["moments"], **options)
    more = statistics_of(task, needs("grasp"), **options)
    again = statistics_of(task, needs("fts", "grasp"), **options)
    curved = statistics_of(task, needs("obd"), **options)
    assert runs == ["moments", "hessian", "gauss_newton"]
    assert [f.cached for f in (first, more, again)] == [False, False, True]
    assert more.seconds > first.seconds > 0 and again.seconds == more.seconds
    assert again.passes == ["hessian", "moments"] and first.passes == ["moments"]
    assert curved.passes == ["gauss_newton"] and not curved.cached


def test_another_key_and_another_pass_are_other_files(data, tmp_path, runs):
    task, cache = checked_task(conv_net(), data, None), StatisticsCache(tmp_path)
    for key in ("one", "two"):
        statistics_of(task, ["moments", "gauss_newton"], cache=cache, key=key)
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        f"{key}-{name}"
        for key in ("one", "two")
        for name in ("gauss_newton", "moments")
    ]
    assert len(runs) == 4


@pytest.mark.parametrize("cached", [False, True])
def test_data_that_can_be_read_only_once(data, tmp_path, cached):
    model, cache = conv_net(), StatisticsCache(tmp_path) if cached else None
    once, again = (checked_task(model, d, None) for d in (iter(data), data))
    found = statistics_of(once, ["hessian"], cache=cache)
    wanted = statistics_of(again, ["hessian", "moments"])
    for name, product in wanted.parts["Hm"].items():
        assert torch.equal(found.parts["Hm"][name], product)


def test_a_pass_is_registered_with_what_it_needs_and_yields(data, monkeypatch):
    monkeypatch.setattr("fisherprune.statistics.passes.PASSES", dict(PASSES))

    @register_pass("largest", needs=("moments",), yields=("M",))
    def largest(task: Task) -> ModelStatistics:
        """Yield the largest gradient of each parameter, everywhere in it."""
        parts = {
            n: m.abs().max().expand_as(m) for n, m in task.found.parts["m"].items()
        }
        return ModelStatistics({"M": parts}, task.found.samples, task.group_size)

    task = checked_task(conv_net(), data, None, group_size=4)
    found = statistics_of(task, ["largest"])
    assert found.passes == ["largest", "moments"]
    assert (found.samples, found.groups, found.group_size) == (13, 4, 4)
    moments = fp.gradient_moments(task.model, data, group_size=4)
    for name, largest in found.parts["M"].items():
        assert largest.eq(moments.mean[name].abs().max()).all()
    with pytest.raises(fp.FisherpruneError, match="needs must be of .*, got synflow"):
        register_pass("other", needs=("synflow",), yields=("X",))
    match = "register_pass: name must be new, got 'largest', which is taken"
    with pytest.raises(fp.FisherpruneError, match=match):
        register_pass("largest", yields=("X",))


def test_a_criterion_reads_what_it_says_that_it_needs(data, monkeypatch):
    monkeypatch.setattr("fisherprune.scoring.criteria.CRITERIA", {})

    @fp.register_criterion("moments")
    def sly(s):
        return s.w * s.H

    with pytest.raises(AttributeError, match="statistics must hold 'H': a criterion"):
        fp.score(conv_net(), data, "sly")


def test_data_free_criteria_read_nothing(tmp_path):
    def unread():
        raise AssertionError("the data was read")
        yield

    task, cache = checked_task(conv_net(), unread(), None), StatisticsCache(tmp_path)
    found = statistics_of(task, needs("random", "magnitude"), cache=cache)
    assert found == ModelStatistics() and (found.seconds, found.samples) == (0, 0)
    assert not found.cached and list(tmp_path.iterdir()) == []


def test_mistakes(data):
    model = conv_net()
    task = checked_task(model, data, None)
    with pytest.raises(
        fp.FisherpruneError, match="needs must be of gauss_newton, hessian, m.*gradient"
    ):
        statistics_of(task, ["gradient"])
    with pytest.raises(fp.FisherpruneError, match="must be left out for the Gauss"):
        fp.score(model, iter(data), "obd", loss_fn=torch.dot)
    with pytest.raises(fp.FisherpruneError, match="group_size must be an .*, got 0"):
        checked_task(model, data, None, group_size=0)
    found = statistics_of(task, ["moments"])
    with pytest.raises(
        fp.FisherpruneError, match=r"for grasp must hold hessian, got \['moments'\]"
    ):
        score_from(task.parameters, found, scoring_criteria(["fts", "grasp"]))
    with pytest.raises(fp.FisherpruneError, match="dense baseline"):
        scoring_criteria(["fts", "none"])
