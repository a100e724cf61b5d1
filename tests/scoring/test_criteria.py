"""Every criterion against its formula in float64 over one-sample-at-a-time moments."""

from functools import partial

import pytest
import torch
import truth
from nets import batches, conv_net, narrow_vgg11
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherprune as fp
from fisherprune import models
from fisherprune.masks.counts import keep_count
from fisherprune.scoring.criteria import CRITERIA, Statistics, get_criterion
from fisherprune.statistics.passes import PASSES
from fisherprune.streams import stream

ELSEWHERE = {"prospr", "ntk_sap"}
"""Whose passes' own tests compare the masks."""
CODES = sorted(truth.FORMULAS)


def test_every_criterion_has_a_truth_and_a_summary():
    assert sorted(fp.criteria()) == sorted([*CODES, "none"])
    assert all(get_criterion(code).summary for code in fp.criteria())
    with pytest.raises(
        fp.FisherpruneError, match="unknown criterion 'fst'; known .*fts"
    ):
        get_criterion("fst")


@pytest.mark.parametrize("code", CODES)
def test_formula(code):
    letters = [letter for each in PASSES.values() for letter in each.yields]
    found = dict(zip(letters, torch.randn(len(letters), 50).double(), strict=True))
    found["F"] = found["m"].square() + torch.rand(50)
    found["F"][:5] = found["m"][:5] = 0
    w = torch.randn(50, dtype=torch.float64)
    statistics = Statistics(w, 3, stream(7, "fc.weight"), **found)
    drawn = truth.uniform(7, "fc.weight", w.shape)
    expected = truth.score(code, w, 3, drawn, **found)
    score = get_criterion(code).score(statistics).double()
    torch.testing.assert_close(score, expected)


def test_a_criterion_of_ones_own(monkeypatch):
    monkeypatch.setattr("fisherprune.scoring.criteria.CRITERIA", dict(CRITERIA))

    @fp.register_criterion("moments")
    def signal(s):
        """``m^2 / F``, at most 1."""
        return s.m.square() / s.F.clamp_min(1e-30)

    model, x, y = conv_net(), torch.randn(13, 3, 9, 9), torch.randint(5, (13,))
    expected = truth.moments(model, x, y, fp.prunable_parameters(model))
    found = fp.score(model, batches(x, y, 5), "signal")
    for name, (m, fisher) in expected.items():
        wanted = m**2 / fisher.clamp_min(1e-30)
        assert truth.relative_error(found[name], wanted) < 1e-5
    masks = fp.prune(model, [(x, y)], "signal", 0.8, ties="position")
    assert round(masks.sparsity(), 2) == 0.8
    assert "signal" in fp.criteria()
    assert get_criterion("signal").summary == "``m^2 / F``, at most 1."


def test_criteria_that_can_not_be_registered(monkeypatch):
    monkeypatch.setattr("fisherprune.scoring.criteria.CRITERIA", dict(CRITERIA))

    def fts(s):
        return s.w

    match = "register_criterion: code must be new, got 'fts', which is taken"
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.register_criterion()(fts)
    assert get_criterion("fts").score is not fts
    with pytest.raises(fp.FisherpruneError, match="needs must be of gau.*, got momen$"):
        fp.register_criterion("momen")
    with pytest.raises(fp.FisherpruneError, match="code must be new"):
        fp.register_criterion()(get_criterion("none").score)


def test_fbss_is_finite_where_the_fisher_nearly_vanishes():
    m = torch.tensor([0.0, 1e-22, 1e-23, 1e-30])
    fisher = m.square()  # denormal, or zero
    w = torch.full_like(m, 0.5)
    score = get_criterion("fbss").score(Statistics(w=w, m=m, F=fisher))
    assert score.isfinite().all()
    assert (score[fisher == 0] == 0).all()


def test_random_depends_on_the_seed_alone():
    model, other = conv_net(), conv_net()
    a, b = (fp.score(m, [], "random", seed=3) for m in (model, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    c = fp.score(model, [], "random", seed=4)
    assert not torch.equal(a["0.weight"], c["0.weight"])
    assert all(0 <= s.min() and s.max() < 1 for s in a.values())


def test_random_scores_of_a_parameter_are_its_own():
    model = conv_net()
    alone = {"9.weight": model[9].weight}
    (score,) = fp.score(model, [], "random", seed=3, parameters=alone).values()
    together = fp.score(model, [], "random", seed=3)
    assert torch.equal(score, together["9.weight"])
    flat = [s.flatten()[:20] for s in together.values()]
    assert not any(torch.equal(a, b) for a, b in zip(flat, flat[1:], strict=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_random_does_not_depend_on_defaults(dtype):
    model = conv_net()
    expected = fp.score(model, [], "random", seed=3)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = fp.score(model, [], "random", seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_magnitude_reads_no_data():
    model = conv_net()
    scores = fp.score(model, None, "magnitude")
    assert torch.equal(scores["3.weight"], model[3].weight.abs())


def digits(samples, size):
    """Real images: handwritten digits, enlarged to three channels of ``size``."""
    images, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(images))[:samples]
    x = torch.tensor(images, dtype=torch.float32)[chosen].view(-1, 1, 8, 8) / 8 - 1
    x = nn.functional.interpolate(x, size=(size, size), mode="bilinear")
    return x.expand(-1, 3, -1, -1), torch.tensor(labels)[chosen]


@pytest.mark.parametrize(
    ("make", "size", "samples", "group_size"),
    [
        (lambda: conv_net(10), 9, 30, 1),
        (lambda: conv_net(10), 9, 30, 7),
        (models.resnet20, 16, 5, 1),
        (narrow_vgg11, 16, 4, 1),
    ],
    ids=["small", "small_groups", "resnet20", "vgg11"],
)
def test_masks_equal_those_of_a_float64_loop(make, size, samples, group_size):
    model, (x, y) = make(), digits(samples, size)
    named = fp.prunable_parameters(model)
    moments = truth.moments(model, x, y, named, group_size)
    products = truth.hessian_gradient(model, x, y, named, group_size)
    curvature = truth.gauss_newton_diagonal(model, x, named)
    slopes = truth.synaptic_flow(model, x.shape[1:], named)
    estimates = truth.hutchinson(model, x, y, named, 5, 2)
    options = {"group_size": group_size, "seed": 5, "settings": fp.Settings(probes=2)}
    codes = sorted({*CODES} - ELSEWHERE)
    found = fp.score_all(model, batches(x, y, 4), codes, **options)
    total = sum(p.numel() for p in named.values())
    for code in codes:
        expected = {
            name: truth.score(
                code,
                p.detach().double(),
                group_size,
                truth.uniform(5, name, p.shape),
                m=moments[name][0],
                F=moments[name][1],
                Hm=products[name],
                H=curvature[name],
                D=estimates[name],
                R=slopes[name],
            )
            for name, p in named.items()
        }
        for sparsity in (0.5, 0.9, 0.99) if total < 10_000 else (0.9,):
            k = keep_count(total, sparsity)
            masks = fp.select_masks(found[code], sparsity, ties="position")
            wanted = truth.keep_largest(expected, k)
            differ = {n: masks[n] != wanted[n] for n in named}
            if code == "fbss":  # m^2 / F is 1 / N wherever one sample has a gradient
                least = torch.cat([expected[n][wanted[n]] for n in named]).min()
                far = {n: (s - least).abs() > 1e-5 * least for n, s in expected.items()}
                differ = {n: differ[n] & far[n] for n in named}
            assert masks.kept() == k
            hessian = code.startswith(("grasp", "hutchinson"))
            allowed = max(2, (1e-3 if hessian else 1e-4) * total)
            count = sum(int(each.sum()) for each in differ.values())
            assert count <= allowed, (code, sparsity)


class Block(nn.Module):
    """A block that may run again in the backward pass; inputs [N, 6]."""

    def __init__(self, recomputes):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.recomputes = recomputes

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.recomputes(self.block, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("criterion", [c for c in fp.criteria() if c != "none"])
def test_what_runs_again_is_refused_or_makes_no_difference(criterion, reentrant):
    """Weights that are others for a forward pass are the model's own later."""
    plain = Block(lambda block, x: block(x))
    other = Block(partial(checkpoint, use_reentrant=reentrant))
    other.load_state_dict(plain.state_dict())
    given = [(torch.randn(5, 6), torch.randint(4, (5,)))]
    wanted = fp.score(plain, given, criterion)
    try:
        found = fp.score(other, given, criterion)
    except fp.FisherpruneError as error:
        assert "switched off" in f"{error}" or "switch checkpointing off" in f"{error}"
    else:
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name])


class Apart(nn.Module):
    """Reads a weight from a list, too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.several = [self.first.weight]

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((x @ self.several[0].T).relu())


@pytest.mark.parametrize("criterion", ["synflow", "prospr", "ntk_sap"])
def test_parameters_that_are_kept_elsewhere_have_no_stand_ins(criterion):
    model, match = Apart(), "must read its parameter 'first.weight' as an attribute"
    for layer in (model.first, model.last):
        layer.weight.data.abs_().add_(0.1)  # a flow in float32
    given = [(torch.rand(5, 6), torch.randint(4, (5,)))]
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.score(model, given, criterion)
    assert fp.score(model, given, "grasp")["first.weight"].any()
