"""Statistics with and without a cache, and the formulas applied to them."""

from dataclasses import replace

import pytest
import torch
import truth
from nets import Own, RowByRow, batches, conv_net
from torch import nn

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
    task = checked_task(model, data, None, group_size=2, seed=3)
    runs.clear()
    for _ in range(2):
        cache = StatisticsCache(tmp_path)
        found = statistics_of(task, needs_of(ALL), cache=cache, key="k")
        scores = score_from(task.parameters, found, ALL, seed=3)
        for code in CODES:
            for name, s in plain[code].items():
                assert torch.equal(scores[code][name], s), (code, name)
    assert sorted(runs) == sorted({*PASSES} - {"gradient"})  # which is within moments
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
    both = first.seconds + more.seconds
    assert min(first.seconds, more.seconds) > 0 and again.seconds == both
    assert more.passes == ["hessian"]
    assert again.passes == ["gradient", "hessian", "moments"]
    assert first.passes == ["gradient", "moments"]
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
    assert found.passes == ["gradient", "largest", "moments"]
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
        fp.FisherpruneError,
        match="needs must be of gauss_newton, gradient, h.*, got synflow",
    ):
        statistics_of(task, ["synflow"])
    with pytest.raises(
        fp.FisherpruneError, match="loss_fn must be none .* for the Gauss"
    ):
        fp.score(model, iter(data), "obd", loss_fn=torch.dot)
    with pytest.raises(fp.FisherpruneError, match="group_size must be an .*, got 0"):
        checked_task(model, data, None, group_size=0)
    found = statistics_of(task, ["moments"])
    with pytest.raises(
        fp.FisherpruneError,
        match=r"grasp must hold hessian, got \['gradient', 'moments'\]",
    ):
        score_from(task.parameters, found, scoring_criteria(["fts", "grasp"]))
    with pytest.raises(fp.FisherpruneError, match="dense baseline"):
        scoring_criteria(["fts", "none"])


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 13, 20])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_the_mean_gradient_alone_needs_no_run_of_each_sample(group_size, size):
    model, x, y = RowByRow(), torch.randn(13, 3, 4), torch.randint(5, (13,))
    parameters = dict(model.named_parameters())
    options = {"parameters": parameters, "group_size": group_size}
    expected = truth.moments(model, x, y, parameters, group_size)
    codes = ["snip", "grad_norm", "magnitude"]
    found = fp.score_all(model, iter(batches(x, y, size)), codes, **options)
    for name, (mean, _) in expected.items():
        assert truth.relative_error(found["grad_norm"][name], mean.abs()) < 1e-5
        product = (parameters[name].double() * mean).abs()
        assert truth.relative_error(found["snip"][name], product) < 1e-5
    with pytest.warns(fp.FisherpruneWarning, match="'fc.weight' .linear: "):
        fisher = fp.score(model, batches(x, y, 13), "fisher_diag", **options)
    for name, (_, square) in expected.items():
        assert truth.relative_error(fisher[name], square) < 1e-5


def test_weights_of_float64_are_left_as_they_are():
    model, x, y = RowByRow().double(), torch.randn(13, 3, 4), torch.randint(5, (13,))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    expected = truth.moments(model, x, y, parameters)
    options = {"parameters": parameters}
    found = fp.score(model, [(x.double(), y)], "grad_norm", **options)
    for name, (mean, _) in expected.items():
        assert truth.relative_error(found[name], mean.abs()) < 1e-5
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_plain_autograd_is_the_way_only_where_samples_would_run_alone(
    data, tmp_path, runs
):
    task, cache = checked_task(conv_net(), data, None), StatisticsCache(tmp_path)
    moments = fp.gradient_moments(task.model, data)
    for kept in (None, cache, cache):
        found = statistics_of(task, needs("snip"), cache=kept, key="k")
        for name, mean in moments.mean.items():
            assert torch.equal(found.parts["m"][name], mean)
    assert runs == ["moments"] * 2 and found.passes == ["gradient", "moments"]
    x, y = torch.randn(13, 3, 4), torch.randint(5, (13,))
    model = RowByRow()
    task = checked_task(model, [(x, y)], dict(model.named_parameters()))
    for _ in range(2):
        found = statistics_of(task, needs("snip"), cache=cache, key="other")
    assert found.passes == ["gradient"] and found.cached and found.samples == 13


def test_samples_that_mix_have_no_plain_gradient_either():
    model, x, y = RowByRow(), torch.randn(13, 3, 4), torch.randint(5, (13,))
    parameters = dict(model.named_parameters())
    model.mix = lambda h: h - h.mean(0)
    with pytest.raises(fp.FisherpruneError, match="samples mix"):
        fp.score(model, [(x, y)], "snip", parameters=parameters)
    model.mix = lambda h: h * float("nan")
    with pytest.raises(fp.FisherpruneError, match="must be finite"):
        fp.score(model, [(x, y)], "snip", parameters=parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recurrent_layers_go_backward_on_a_gpu():
    model = Own(
        lambda m, x: m.head(m.lstm(x)[0][:, -1]),
        lstm=nn.LSTM(4, 6, batch_first=True),
        head=nn.Linear(6, 5),
    )
    x, y = torch.randn(13, 3, 4), torch.randint(5, (13,))
    model.lstm.dropout = 0.5
    expected = truth.moments(model, x, y, dict(model.named_parameters()))
    model.cuda().train()
    parameters = {n: p for n, p in model.named_parameters() if "lstm" in n}
    found = fp.score(model, [(x, y)], "grad_norm", parameters=parameters)
    for name, score in found.items():
        assert truth.relative_error(score.cpu(), expected[name][0].abs()) < 1e-3
    assert model.lstm.training and model.lstm.dropout == 0.5


def test_mean_gradients_of_lone_samples_behind_batch_norm():
    """The gradient of the BatchNorm arrives expanded over the positions."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
            self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)
            self.bn.running_mean.normal_(), self.bn.running_var.uniform_(0.5, 2)

        def forward(self, x):
            features = self.bn(self.conv(x).relu()).flatten(2).transpose(1, 2).mean(1)
            return self.head(features + self.lstm(x.flatten(2).mT)[0].mean(1))

    net, x, y = Net(), torch.randn(3, 2, 6, 6), torch.randint(3, (3,))
    named = dict(net.named_parameters())
    batches = list(zip(x.split(1), y.split(1), strict=True))
    found = fp.score(net, batches, "grad_norm", parameters=named)
    expected = truth.moments(net, x, y, [*named])
    for name in named:
        assert truth.relative_error(found[name], expected[name][0].abs()) < 1e-5, name
