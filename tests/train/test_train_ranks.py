"""Several processes that train together do the run of one, up to rounding."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import train_ranks_job as job
import truth
from safetensors.torch import load_file
from trainings import rows, small_run, stopped

from fisherprune import Masks, train
from fisherprune.errors import FisherpruneError
from fisherprune.runs.identity import identity
from fisherprune.statistics.ranks import RankError
from fisherprune.train import launch
from fisherprune.train.launch import launched
from fisherprune.train.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "fts": {"warmup_epochs": 1, "epochs": 2, "lr": 1e-3, "bn_warmup": True},
    "groups": {"group_size": 3, "epochs": 0},
    "rounds": {"method": "grasp", "rounds": 2, "ties": "position", "epochs": 0},
    "not for ranks": {"method": "prospr", "inner_steps": 1, "score_batch_size": 10},
    "dense": {"method": "none", "sparsity": 0.0, "amp": True},
}
COMMANDS = {
    "run": [],
    "mistake": ["--sparsity", "2"],
    "device": ["--device", "cuda:1"],
    "few images": ["--batch-size", "2"],
    "help": ["--help"],
    "no data": ["--dataset", "folder", "--data-dir", "/nowhere"],
}
GIVEN = {"model": f"{job.__file__}:small", "batch_size": 20, "train_samples": 62}
GIVEN |= {"lr_drops": (), "sparsity": 0.5}
FIRST_FAILED = "process_group: rank 0 failed: "


def config_of(folder, **fields):
    return small_run(**GIVEN | {"output_dir": str(folder)} | fields)


def command_of(folder, options):
    argv = ["--model", GIVEN["model"], "--dataset", "digits", "--device", "cpu"]
    argv += ["--train-samples", "20", "--score-samples", "20", "--epochs", "0"]
    return [*argv, "--output-dir", str(folder), *options]


@pytest.fixture(scope="module")
def seed():
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    return seed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the configs, and the results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    configs = {n: config_of(folder, **given) for n, given in OPTIONS.items()}
    return configs, {n: train.run(c, quiet=True) for n, c in configs.items()}


@pytest.fixture(scope="module")
def ranks(alone, seed, tmp_path_factory):
    """Return what each rank found in the job."""
    folder, (configs, _) = tmp_path_factory.mktemp("ranks"), alone
    several = {
        n: replace(c, processes=job.RANKS, output_dir=str(folder / n))
        for n, c in configs.items()
    }
    resumed = {
        "from one": (folder / "one", configs["fts"]),
        "interrupted": (folder / "three", several["fts"]),
    }
    stopped(configs["fts"], folder / "one", 2)
    with pytest.raises(KeyboardInterrupt, match=f"--resume {folder}/three goes on$"):
        stop = {"checkpointed": job.Interrupt(3), "quiet": True}
        train.run(several["fts"], folder=folder / "three", **stop)
    assert (folder / "three" / "checkpoint.pt").exists()
    commands = {n: command_of(folder / n, o) for n, o in COMMANDS.items()}
    work = partial(job.be_rank, several, resumed, commands, seed)
    return launched(work, job.RANKS)


def weights(result, name="last"):
    return load_file(result.folder / f"{name}.safetensors")


def assert_close(found, expected, error):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert (each is None) == (found[name] is None)
        if each is not None:
            assert truth.relative_error(found[name], each.double()) < error, name


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_of_several_processes_is_that_of_one(name, ranks, alone):
    one, found = alone[1][name], ranks[0]["results"][name]
    assert found.environment["processes"] == job.RANKS
    assert one.environment["processes"] == 1
    if name != "dense":
        masks = (Masks.load(r.folder / "masks.safetensors") for r in (one, found))
        assert next(masks) == next(masks)
        assert found.scoring["samples"] == one.scoring["samples"]
    assert_close(weights(found), weights(one), 2e-2 if name == "dense" else 1e-4)
    tables = [rows(r.folder) for r in (found, one) if one.config.epochs]
    for ours, theirs in zip(*tables, strict=True):
        for column in ours.keys() - {"phase"}:
            value = float(theirs[column])
            assert float(ours[column]) == pytest.approx(value, abs=2e-2), column
    assert found.last.loss == pytest.approx(one.last.loss, rel=1e-2)


def test_an_interrupted_run_is_the_same_in_each_bit(ranks):
    one, other = (ranks[0]["results"][name] for name in ("fts", "interrupted"))
    assert other.notes == ()
    assert rows(one.folder) == rows(other.folder)
    for name in ("masks", "last", "best"):
        found, again = weights(one, name), weights(other, name)
        assert all(torch.equal(found[n], again[n]) for n in found | again)


def test_one_rank_writes_and_all_have_the_result(ranks):
    for each in ranks[1:]:
        for name, result in each["results"].items():
            assert result == ranks[0]["results"][name]
    folder = Path(ranks[0]["results"]["groups"].folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    written = {p.name for p in folder.iterdir()}
    files = ("best.safetensors", "last.safetensors", "masks.safetensors")
    assert written == {*files, "config.json", "results.json"}


def test_another_number_of_processes_goes_on_with_a_run(ranks, alone):
    found, one = ranks[0]["results"]["from one"], alone[1]["fts"]
    assert f", then {job.RANKS} x " in found.notes[0]
    assert json.loads((found.folder / "config.json").read_text())["processes"] == 1
    assert_close(weights(found), weights(one), 1e-4)


def test_other_numbers_of_processes_are_other_runs(alone):
    config = alone[0]["fts"]
    counts = [replace(config, processes=count) for count in (1, 2, 3)]
    assert len({identity(each) for each in counts}) == 3
    assert identity(counts[0]) == identity(config)


@pytest.mark.parametrize("name", ["steps", "channels_last", "float64"])
def test_steps_are_those_of_the_whole_batch(name, ranks, seed):
    one = job.steps(seed, Ranks(), torch.float64)
    assert one["0 idle.weight"] is None and len(one) > 20
    error = 1e-10 if name == "float64" else 1e-3
    for each in ranks:
        assert each[name].keys() == one.keys() and each[name]["0 idle.weight"] is None
        for n, found in each[name].items():
            if found is not None:
                assert torch.equal(found, ranks[0][name][n]), n
                assert (found.double() - one[n]).abs().max() < error, n


TOLD = {
    "diverged": "training: the loss must stay finite, got ",
    "data": "train_samples must be at most the 1149 training images",
}


def test_what_ranks_tell_of_mistakes(ranks):
    for number, each in enumerate(ranks):
        told = each["told"]
        failed = ("RankError", "process_group: rank 1 failed: the second")
        own = ("FisherpruneError", "the second")
        assert told["in turn"] == (own if number == 1 else failed)
        assert told["from the second"] == 3
        kind, text = told["tensors"]
        assert kind == "RankError" and text.startswith(
            "process_group: tensors must be the same on all ranks, got sums [0.0] on "
            "rank 0 and sums [2.0] on rank 2"
        )
        count = "processes must be 3, the number of ranks of this job, got 2"
        assert told["count"] == ("FieldError", count)
        for name, text in TOLD.items():
            kind, found = told[name]
            assert found.startswith(FIRST_FAILED * (number > 0) + text)
            assert (kind == "RankError") == (number > 0)


ERRORS = {
    "mistake": "sparsity must be a number in [0, 1], got 2.0",
    "device": "device must be auto, cpu or cuda for 3 processes, each with a GPU of "
    "its own: choose GPUs by CUDA_VISIBLE_DEVICES, got cuda:1",
    "few images": "batch_size must be at least 3, an image for each process, got 2",
    "no data": "/nowhere/train must be a folder",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_rank_prints(name, ranks):
    first, *others = (each["commands"][name] for each in ranks)
    code, out, err = first
    assert [each[1:] for each in others] == [("", "")] * 2
    assert [each[0] for each in others] == [code] * 2
    if name in ERRORS:
        assert (code, out) == (2, "")
        assert err.startswith("fisherprune.train: error: ") and ERRORS[name] in err
    else:
        text = "sparsity of the trained weights" if name == "run" else "--processes N"
        assert (code, err) == (0, "") and text in out


def test_ranks_are_told_who_they_are():
    assert launched(partial(job.say, 5), 2) == (5, 2, 1)


@pytest.mark.parametrize(
    "work, error, message",
    [
        (partial(job.fail_at, 1, job.others_fail, 1), RuntimeError, "number of elem"),
        (partial(job.fail_at, 0, partial(time.sleep, 600)), RuntimeError, "elements"),
        (
            partial(job.end_at, 1, partial(time.sleep, 600)),
            FisherpruneError,
            "^rank 1 has ended with code -9$",
        ),
        (partial(job.say, 0), RuntimeError, "^Unsendable: this and that$"),
    ],
)
def test_a_rank_that_fails_stops_the_others(work, error, message, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    with pytest.raises(error, match=message) as raised:
        launched(work, 2)
    if raised.type is RuntimeError:
        assert "train_ranks_job.py" in f"{raised.value.__cause__}"


def test_a_cause_that_never_comes_is_not_awaited_for_long(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    with pytest.raises(RankError, match="ranks can't be reached"):
        launched(partial(job.fail_at, 1, job.others_fail, 600), 2)
