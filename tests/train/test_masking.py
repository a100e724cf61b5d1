"""From a configuration to masks: shared passes, scopes, sanity baselines, choices."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from trainings import images_of

import fisherprune as fp
from fisherprune import models, train
from fisherprune.baselines import shuffle_masks
from fisherprune.masks.counts import keep_count
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import identity
from fisherprune.scoring.criteria import get_criterion
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.passes import PASSES
from fisherprune.streams import stream_seed
from fisherprune.train import steps
from fisherprune.train.__main__ import main
from fisherprune.train.masking import make_masks, scored_at_once, warm_up_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(small):
    return replace(small, epochs=0)


def network(config):
    seed = stream_seed(config.seed, "initialization")
    return models.create(config.model, 10, 1, seed=seed)


def masks_of(config, **options):
    images = images_of(config)
    model = network(config)
    if config.bn_warmup:
        warm_up_batchnorm(model, images.train, config.training_batch_size, 0, True)
    return make_masks(config, model, images.scoring, quiet=True, **options)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_methods_and_sparsities_of_a_seed_share_one_pass(small, tmp_path, monkeypatch):
    runs, moments = [], PASSES["moments"]
    spy = replace(moments, run=lambda task: (runs.append(1), moments.run(task))[1])
    monkeypatch.setitem(PASSES, "moments", spy)
    folder, costs = tmp_path / "statistics", []
    for method in ("snip", "fts", "magnitude", "fisher_diag"):
        for sparsity in (0.5, 0.98):
            config = replace(small, method=method, sparsity=sparsity)
            shared, cost = masks_of(config, statistics=folder)
            costs.append(cost)
            alone, _ = masks_of(config)
            assert equal(shared, alone)
    assert len(runs) == 1 + 6  # and the six without a cache
    assert [c["cached"] for c in costs] == [
        False,
        *[True] * 3,
        *[False] * 2,
        *[True] * 2,
    ]
    assert len({c["seconds"] for c in costs if c["samples"] == 20}) == 1
    assert costs[4] == {"seconds": 0.0, "samples": 0, "cached": False}
    for other in (
        {"seed": 1},
        {"bn_warmup": True},
        {"score_samples": 21},
        {"score_batch_size": 7},
        {"group_size": 3},
        {"labels": "sampled"},
        {"draws": 2},
        {"skip": ("bias", "linear")},
        {"model": "resnet20", "image_size": 9},
    ):
        masks_of(replace(small, **other), statistics=StatisticsCache(folder))
    assert len(runs) == 16 and len(list(folder.iterdir())) == 10


@pytest.mark.parametrize("change", ["mean", "std", "images", "labels"])
def test_other_images_have_other_statistics(change, small, tmp_path):
    images = images_of(small).scoring
    other = {
        "mean": lambda value: tuple(m + 0.01 for m in value),
        "std": lambda value: tuple(2 * s for s in value),
        "images": lambda value: value.flip(0),
        "labels": lambda value: value.flip(0),
    }[change](getattr(images, change))
    changed = replace(images, **{change: other})
    for each in (images, changed, images):
        options = {"statistics": tmp_path / "statistics", "quiet": True}
        _, cost = make_masks(small, network(small), each, **options)
    assert cost["cached"] and len(list((tmp_path / "statistics").iterdir())) == 2


def test_a_run_says_what_its_scores_cost(small, tmp_path):
    folder = tmp_path / "statistics"
    first, second = (train.run(small, statistics=folder, quiet=True) for _ in range(2))
    assert first.scoring["samples"] == second.scoring["samples"] == 20
    assert first.scoring["seconds"] == second.scoring["seconds"] > 0
    assert not first.scoring["cached"] and second.scoring["cached"]
    assert second.as_json()["scoring"] == second.scoring
    dense = train.run(replace(small, method="none", sparsity=0.0), quiet=True)
    assert dense.scoring is None


def test_skip_chooses_what_is_pruned_and_counted(small):
    skip = ("linear", "bn2")
    result = train.run(replace(small, skip=skip), quiet=True)
    wanted = fp.prunable_parameters(network(small), skip)
    masks = fp.Masks.load(result.folder / "masks.safetensors")
    assert [layer.name for layer in result.layers] == list(wanted)
    assert set(masks) == set(wanted)
    assert {"bn1.weight", "bn1.bias", "conv1.weight"} < set(masks)
    total = sum(p.numel() for p in wanted.values())
    assert result.total == total and result.kept == total // 10
    # A bias of BatchNorm that is kept is still 0 here: kept by the mask, not by value.
    assert {c.name: c.kept for c in result.layers} == {
        n: int(m.sum()) for n, m in masks.items()
    }


@pytest.mark.parametrize("code", ["snip", "force", "synflow"])
def test_rounds(code, small, tmp_path):
    """The same masks as of the library; no statistics of a round are kept."""
    config = replace(small, method=code, rounds=3, schedule="linear", ties="position")
    folder = tmp_path / "statistics"
    found, cost = masks_of(config, statistics=folder)
    model = network(config)
    batches = list(images_of(config).scoring.batches(256))
    options = {"rounds": 3, "schedule": "linear", "ties": "position"}
    assert [found] == fp.find_masks(model, batches, code, [0.9], **options)
    assert cost["samples"] == (0 if code == "synflow" else 3 * 20)
    assert cost["seconds"] > 0 and not cost["cached"] and not [*folder.iterdir()]
    inverted, _ = masks_of(replace(config, invert_scores=True))
    assert inverted.kept() == found.kept() and inverted != found


@pytest.mark.parametrize(
    "code, device, size, given, wanted",
    [
        ("fts", "cpu", 32, None, 256),
        ("fts", "cuda", 32, None, 1024),
        ("obd", "cuda", 28, None, 1024),
        ("magnitude", "cuda", 8, None, 1024),
        ("fts", "cuda", 64, None, 256),
        ("grasp", "cuda", 32, None, 256),  # second derivatives take more memory
        ("prospr", "cuda", 32, None, 256),  # a batch is a step
        ("ntk_sap", "cuda", 32, None, 256),  # or a draw
        ("fts", "cuda", 32, 100, 100),
        ("prospr", "cpu", 224, 7, 7),
    ],
)
def test_images_scored_at_a_time(code, device, size, given, wanted):
    config = TrainConfig(method=code, score_batch_size=given)
    with FakeTensorMode():
        images = torch.empty(2, 3, size, size, device=device)
    assert scored_at_once(config, get_criterion(code).needs, images) == wanted


def test_the_default_batch_spelled_out_is_the_same_run(small):
    none, spelled, other = (
        identity(replace(small, score_batch_size=n)) for n in (None, 256, 255)
    )
    assert none == spelled != other


def test_a_methods_own_rounds_need_not_be_spelled_out(small):
    own, spelled, other = (
        identity(replace(small, method="synflow", rounds=n)) for n in (None, 100, 99)
    )
    assert own == spelled != other
    assert identity(small) == identity(replace(small, rounds=1))
    for wrong in ({"rounds": 2}, {"schedule": "linear"}):
        with pytest.raises(fp.FisherpruneError, match="for method none"):
            replace(small, method="none", sparsity=0.0, **wrong)


def test_scopes_by_density(small):
    erk, _ = masks_of(replace(small, scope="erk", sparsity=0.8))
    snip, _ = masks_of(replace(small, method="snip", sparsity=0.8))
    given = snip.density()
    random, _ = masks_of(
        replace(
            small, method="random", sparsity=0.8, scope="densities", densities=given
        )
    )
    assert erk.kept() == snip.kept() == random.kept()
    assert random.density() == given != erk.density()
    assert erk.density()["conv1.weight"] == 1
    with pytest.raises(fp.FisherpruneError, match="they lack 'conv1.weight'"):
        masks_of(replace(small, scope="densities", densities={"layer1": 1.0}))


@pytest.mark.parametrize("structure", ["2:4", "channels", "blocks:2x8"])
def test_structures(small, structure):
    """Masks are those that the library makes of the same scores."""
    config = replace(small, method="magnitude", sparsity=0.5, structure=structure)
    masks, _ = masks_of(config)
    scores = fp.score(network(config), [], "magnitude")
    assert masks == fp.select_masks(scores, 0.5, structure=structure)
    assert masks != masks_of(replace(config, structure="weights"))[0]


def test_layers_keep_their_least(small):
    plain, _ = masks_of(replace(small, sparsity=0.999))
    masks, _ = masks_of(replace(small, sparsity=0.999, min_per_layer=5))
    assert masks.kept() == plain.kept()
    assert min(int(mask.sum()) for mask in plain.values()) < 5
    assert min(int(mask.sum()) for mask in masks.values()) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_per_layer": 10**6}, "min_per_layer: the layers must keep 267408"),
        (
            {"scope": "erk_plus", "sparsity": 0.9999},
            "keeps all 144 weights of the first",
        ),
    ],
)
def test_masks_that_can_not_be_are_refused(small, fields, message):
    with pytest.raises(fp.FisherpruneError, match=message):
        train.run(replace(small, **fields), quiet=True)


def test_another_runs_densities_on_the_command_line(small, capsys):
    first = train.run(replace(small, method="snip"), quiet=True)
    command = (
        "--dataset digits --model resnet20 --train-samples 65 --score-samples 20"
        " --quiet --epochs 0 --device cpu --method random --shuffle-masks"
        " --scope densities"
        f" --densities {first.folder}/masks.safetensors --output-dir {small.output_dir}"
    )
    assert main(command.split()) == 0
    folder = capsys.readouterr().out.splitlines()[-1].removeprefix("written to ")
    second, snip = (
        fp.Masks.load(f"{run}/masks.safetensors") for run in (folder, first.folder)
    )
    assert second.density() == snip.density() and second.jaccard(snip) < 0.5


def test_inverted_scores_keep_the_smallest(small):
    config = replace(small, method="magnitude", sparsity=0.9)
    worst, _ = masks_of(replace(config, invert_scores=True))
    best, _ = masks_of(config)
    assert worst.jaccard(best) == 0 and worst.kept() == best.kept()
    weights = dict(network(small).named_parameters())
    kept = torch.cat([weights[n][m].abs() for n, m in worst.items()])
    pruned = torch.cat([weights[n][~m].abs() for n, m in worst.items()])
    assert kept.max() <= pruned.min()


def test_shuffled_masks_keep_the_densities(small):
    plain, _ = masks_of(small)
    shuffled, _ = masks_of(replace(small, shuffle_masks=True))
    assert shuffled.density() == plain.density() and shuffled.jaccard(plain) < 0.5
    assert equal(shuffled, shuffle_masks(plain, stream_seed(0, "mask shuffle")))


def test_reinitialized_weights_under_the_same_mask(small):
    plain, new = (
        train.run(replace(small, reinitialize=flag), quiet=True)
        for flag in (False, True)
    )
    masks = fp.Masks.load(plain.folder / "masks.safetensors")
    assert equal(masks, fp.Masks.load(new.folder / "masks.safetensors"))
    old, drawn = (load_file(r.folder / "last.safetensors") for r in (plain, new))
    for name, mask in masks.items():
        assert not drawn[name][~mask].any()
        same = torch.isclose(drawn[name][mask], old[name][mask])
        assert same.double().mean() < 0.1


def test_nothing_of_a_warm_up_survives_reinitialization(small, monkeypatch):
    seen = {}

    def spy(model, optimizer, *, seed):
        seen["momenta"] = len(optimizer.state)
        reinitialize_(model, optimizer, seed=seed)
        seen["left"] = len(optimizer.state)

    reinitialize_ = steps.reinitialize_
    monkeypatch.setattr(steps, "reinitialize_", spy)
    warm = replace(small, reinitialize=True, warmup_epochs=1, bn_warmup=True)
    result = train.run(warm, quiet=True)
    assert seen["momenta"] > 0 and seen["left"] == 0
    last = load_file(result.folder / "last.safetensors")
    assert not last["bn1.running_mean"].any() and (last["bn1.running_var"] == 1).all()
    cold = train.run(replace(small, reinitialize=True, method="random"), quiet=True)
    same = load_file(cold.folder / "last.safetensors")
    assert torch.equal(last["linear.weight"], same["linear.weight"])


def test_scores_that_do_not_decide_end_the_run_unless_position_may(small):
    tied = replace(small, model="vgg11", score_samples=10)  # most scores are 0
    with pytest.raises(fp.FisherpruneError, match="equal scores of 0 compete"):
        train.run(tied, quiet=True)
    result = train.run(replace(tied, ties="position"), quiet=True)
    assert result.kept == keep_count(result.total, 0.9)
