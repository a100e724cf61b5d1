import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import result_trees as trees
import torch

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.plan import Overrides, Plan
from fisherprune.experiments.published import METHODS, SCHEMA, SKIP, read_published
from fisherprune.experiments.study import FIELDS, read_study
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import identity

STUDIES = Path(__file__).parents[2] / "studies"
REFERENCE = sorted((STUDIES / "reference").glob("*.json"))


@pytest.fixture
def exp():
    """Return the content of a file of the published schema."""
    return json.loads((STUDIES / "reference" / "fts.json").read_text())


@pytest.fixture
def written(tmp_path):
    def write(content, name="exp.json"):
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text)
        return path

    return write


def test_the_ten_published_methods_at_the_setting_of_the_table():
    runs = {read_published(path).config for path in REFERENCE}
    assert {run.method for run in runs} == set(METHODS.values())
    table = TrainConfig(skip=SKIP)
    for run in runs:
        wanted = TrainConfig(method="none", sparsity=0.0)
        if run.method != "none":
            wanted = replace(table, method=run.method)
        assert identity(run) == identity(wanted)


def test_published_fields_and_what_they_mean(exp, written, tmp_path):
    exp["general"] |= {"seed": 7, "output_dir": str(tmp_path / "out")}
    exp["general"]["gpu"] = {"ngpus": 0, "gpu_id": 0}
    exp["dataset"] = {"class": "cifar100", "batch_size": 64}
    exp["model"] = {"class": "VGG19", "num_classes": 100}
    exp["training"] |= {"num_steps": 20}
    exp["training"]["optimizer"] |= {"lr_drops": [6, 12], "momentum": 0}
    exp["training"]["compressor"] = {
        "class": "grasp",
        "mask": "layer",
        "sparsity": 0.98,
        "warmup": 2,
        "batch_size": 5000,
    }
    exp["validation"] = {"metric": "f1", "frequency": 3}
    published = read_published(written(exp))
    assert published.output == tmp_path / "out"
    assert published.config == TrainConfig(
        method="grasp_reversed",
        model="vgg19",
        dataset="cifar100",
        sparsity=0.98,
        scope="layer",
        skip=SKIP,
        group_size=5000,
        warmup_epochs=2,
        epochs=18,
        batch_size=64,
        momentum=0.0,
        lr_drops=(4, 10),
        seed=7,
        device="cpu",
        validation_every=3,
        validation_metric="f1",
        output_dir=str(tmp_path / "out"),
    )


def test_a_gpu_is_taken_where_there_is_one(exp, written, monkeypatch):
    exp["general"]["gpu"]["gpu_id"] = 3
    for available, device in ((False, "auto"), (True, "cuda:3")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        assert read_published(written(exp)).config.device == device


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("training.optimizer.learning_rate", 0, "must be above 0 and finite, got 0.0"),
        ("training.optimizer.momentum", True, "must be a number, got True"),
        ("training.optimizer.lr_drops", [60, "x"], "must be a list of whole numbers"),
        ("training.optimizer.lr_drops", [90, 60], "must be growing numbers of epochs"),
        ("training.optimizer.class", "adam", "must be 'sgd', got 'adam'"),
        ("training.optimizer.nesterov", 1, "is unknown; the fields of training.optim"),
        ("training.optimizer.momenta", 1, r"is unknown \(did you mean momentum\?\)"),
        ("training.num_steps", 160.5, "must be a whole number, got 160.5"),
        ("training.compressor", None, "must be a table of fields, got None"),
        ("training.compressor.class", "obd", "must be one of 'none', .*, got 'obd'"),
        ("training.compressor.mask", "block", "must be one of 'global', 'layer'"),
        ("training.compressor.warmup", 160, "must be below num_steps, 160, .* got 160"),
        ("training.compressor.warmup", -2, "must be at least 0, got -2"),
        ("dataset.class", "mnist", "must be one of cifar10, cifar100, .*, got 'mnist'"),
        ("model.class", "CNN500k", "must be one of resnet18, .*, got 'CNN500k'"),
        ("model.num_classes", 100, "must be 10, the classes of cifar10, got 100"),
        ("validation.metric", "loss", "must be one of 'acc', 'f1', got 'loss'"),
        ("validation.frequency", 0, "must be at least 1, got 0"),
        ("general.gpu.ngpus", 2, "must be 0 or 1, a run takes one device, got 2"),
        ("general.gpu.gpu_id", -1, "must be a whole number of at least 0, got -1"),
        ("compressor", {}, "is unknown; the fields are general, dataset, model"),
    ],
    ids=str,
)
def test_published_values_that_are_wrong(exp, written, place, value, message):
    trees.put(exp, place.replace(".", "/"), value)
    path = written(exp)
    with pytest.raises(FisherpruneError, match=f"^{path}: {place} {message}"):
        read_published(path)


def test_published_values_that_are_wrong_together(exp, written):
    exp["training"]["compressor"]["warmup"] = 60
    drops = "training.optimizer.lr_drops must be after the warm-up of 60 epochs, .* 60"
    with pytest.raises(FisherpruneError, match=drops):
        read_published(written(exp))
    exp["training"]["compressor"]["class"] = "none"
    dense = "training.compressor.sparsity must be 0 for none, .* got 0.9"
    with pytest.raises(FisherpruneError, match=dense):
        read_published(written(exp))


@pytest.mark.parametrize("place", SCHEMA)
def test_every_published_field_must_be_there_and_of_its_kind(exp, written, place):
    words = re.escape(SCHEMA[place][0].words)
    trees.put(exp, place.replace(".", "/"), [True])
    path = written(exp)
    with pytest.raises(FisherpruneError, match=f"^{path}: {place} must be {words}, go"):
        read_published(path)
    trees.put(exp, place.replace(".", "/"))
    missing = f": {place} is missing; it must be {words}$"
    with pytest.raises(FisherpruneError, match=missing):
        read_published(written(exp))


def test_every_table_of_a_published_file_is_known(exp):
    def leaves(content, path=""):
        for name, value in content.items():
            inside = isinstance(value, dict)
            yield from leaves(value, f"{path}{name}.") if inside else [f"{path}{name}"]

    assert sorted(leaves(exp)) == sorted(SCHEMA)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"general": ', "must be a JSON file: Expecting value"),
        ("[1]", r"the whole of it must be a table of fields, got \[1\]"),
        ('{"general": {"id": "a", "id": "b"}}', "field 'id' is there twice"),
        ("\ud800", "must be a JSON file"),
    ],
)
def test_files_that_are_no_published_file(written, tmp_path, text, message):
    path = tmp_path / "exp.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(FisherpruneError, match=f"^{path}: .*{message}"):
        read_published(path)


GRID = """
name = "small"
[run]
dataset = "digits"
lr = 1
lr_drops = []
[grid]
seed = [0, 1]
sparsity = [0.5, 0.9]
method = ["none", "snip"]
shuffle_masks = [false, true]
"""


def test_a_grid_is_a_product_with_one_dense_run(written):
    study = read_study(written(GRID, "s.toml"))
    assert study.name == "small"
    common = {"dataset": "digits", "lr": 1.0, "lr_drops": ()}
    assert list(study.runs) == [
        config
        for seed in (0, 1)
        for config in (
            TrainConfig(method="none", sparsity=0.0, seed=seed, **common),
            *(
                TrainConfig(
                    method="snip", sparsity=s, shuffle_masks=m, seed=seed, **common
                )
                for s in (0.5, 0.9)
                for m in (False, True)
            ),
        )
    ]


def test_several_grids_and_equal_runs_count_once(written):
    text = """
    name = "several"
    [[grid]]
    method = ["snip", "fts"]
    lr_drops = [[60, 120], [80]]
    [[grid]]
    method = "fts"
    sparsity = [0.9, 0.5]
    skip = ["bias", "bn"]
    """
    runs = read_study(written(text + "[[grid]]\nsparsity = [0.9]", "s.toml")).runs
    assert [(r.method, r.lr_drops, r.sparsity, r.skip) for r in runs] == [
        ("snip", (60, 120), 0.9, None),
        ("snip", (80,), 0.9, None),
        ("fts", (60, 120), 0.9, None),
        ("fts", (80,), 0.9, None),
        ("fts", (60, 120), 0.9, ("bias", "bn")),
        ("fts", (60, 120), 0.5, ("bias", "bn")),
    ]


def test_densities_of_a_file_beside_the_study_or_inline(written):
    written('{"conv1.weight": 0.5}', "layers.json")
    text = """
    name = "given"
    [run]
    scope = "densities"
    [grid]
    densities = ["layers.json", {"conv1.weight" = 1}]
    """
    first, second = read_study(written(text, "s.toml")).runs
    assert first.densities == {"conv1.weight": 0.5}
    assert second.densities == {"conv1.weight": 1.0}


def test_every_field_of_a_run_can_be_set_but_for_its_place():
    assert {f.name for f in fields(TrainConfig)} - set(FIELDS) == {
        "output_dir",
        "model_source",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("name = ", "must be a TOML file: Invalid value"),
        ("[run]", "name is missing; it must be a string"),
        ('name = "a/b"', "name must be letters, digits, .*, got 'a/b'"),
        ('name = "a"\nrun = 3', "run must be a table of fields, got 3"),
        ('name = "a"\nruns = 3', r"runs is unknown \(did you mean run\?\); the fields"),
        ('name = "a"\ngrid = [3]', r"grid\[1\] must be a table of fields, got 3"),
        ("[run]\nmethod = 3", "run.method must be a string, got 3"),
        ("[run]\nmethods = 3", r"run.methods is unknown \(did you mean method\?\)"),
        ("[run]\nlr = true", "run.lr must be a number, got True"),
        ("[run]\nlr = inf", "run.lr must be above 0 and finite, got inf"),
        ("[run]\namp = 1", "run.amp must be true or false, got 1"),
        ("[run]\nepochs = 1.0", "run.epochs must be a whole number, got 1.0"),
        ("[run]\noutput_dir = 'x'", "run.output_dir can't be set by a study; --outp"),
        ("[run]\ndensities = 3", "run.densities must be a file's name or a table"),
        ("[grid]\nseed = []", "grid.seed must be a whole number, or a list whose .* i"),
        ("[grid]\nseed = [0, 1.5]", "grid.seed must be a whole number, or a list whos"),
        ("[grid]\nlr_drops = [[1], 2]", "grid.lr_drops must be a list of whole numb"),
        ("[grid]\nmethod = ['snip', 'x']", "grid.method must be one of .*, got 'x'"),
        ("[run]\nseed = 1\n[grid]\nseed = [2]", "grid.seed is set already: by run."),
        ("[run]\ndensities = 'no.json'", "run.densities: .*no.json"),
    ],
)
def test_study_files_that_are_wrong(written, text, message):
    path = written(text if "name" in text else f"name = 'a'\n{text}", "s.toml")
    if text == "[run]":
        path.write_text(text)
    with pytest.raises(FisherpruneError, match=f"^{path}: {message}"):
        read_study(path)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_the_studies_are_valid(path):
    study = read_study(path)
    assert study.name == path.stem
    assert len(study.runs) == len({identity(run) for run in study.runs})


def test_table_1_has_every_cell_with_three_seeds_and_three_dense_runs():
    runs = read_study(STUDIES / "table1.toml").runs
    assert len(runs) == 9 * 5 * 3 + 3
    fts = {
        identity(r) for r in runs if (r.method, r.sparsity, r.seed) == ("fts", 0.9, 0)
    }
    assert fts == {identity(read_published(STUDIES / "reference/fts.json").config)}


def test_a_plan_tells_all_wrong_files_at_once(written, tmp_path):
    one, two = written("[", "a.toml"), written("{", "b.json")
    written(GRID, "c.toml")
    with pytest.raises(FisherpruneError) as caught:
        Plan([tmp_path], Overrides())
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(one), str(two)]


def test_numbers_that_nothing_can_hold_are_one_files_mistake(exp, written, tmp_path):
    wrong = {
        "a.toml": "lr = " + 401 * "9",
        "b.toml": "lr = 0x" + 6000 * "f",  # more digits than Python writes
        "c.toml": f"device = 'cuda:{30 * '9'}'",
        "d.toml": "scope = 'densities'\ndensities = {a = " + 401 * "9" + "}",
    }
    for name, line in wrong.items():
        written(f"name = 'a'\n[run]\n{line}\n", name)
    trees.put(exp, "model/num_classes", 10**400)
    written(exp, "e.json")
    with pytest.raises(FisherpruneError) as caught:
        Plan([tmp_path], Overrides())
    lines = str(caught.value).splitlines()
    names = [*wrong, "e.json"]
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / n) for n in names]
    assert f"run.lr must be a number, got {57 * '9'}..." in lines[0]
    assert "run.lr must be a number, got int too large to show" in lines[1]
    assert f"the classes of cifar10, got 1{56 * '0'}..." in lines[4]


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing", "missing: no such file or folder"),
        ("empty", "empty: holds no .json or .toml file"),
        ("notes.txt", "notes.txt: must be a .toml study, a .json file"),
    ],
)
def test_paths_without_runs(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FisherpruneError, match=message):
        Plan([tmp_path / name], Overrides())


def test_a_plan_follows_a_folder(exp, written, tmp_path):
    written(GRID, "a.toml")
    plan = Plan([tmp_path], Overrides(tmp_path / "out", "cpu", "there"))
    assert {r.results for r in plan.runs} == {tmp_path / "out"}
    assert {(r.config.device, r.config.data_dir) for r in plan.runs} == {
        ("cpu", "there")
    }
    before = len(plan.runs)
    b = written("{", "b.json")  # still being copied
    assert plan.refresh() == [plan.problems[b]]
    assert plan.refresh() == []  # told once
    written(exp, "b.json")
    assert plan.refresh() == [] and not plan.problems
    assert len(plan.runs) == before + 1
    b.unlink()
    plan.refresh()
    assert len(plan.runs) == before


def test_a_file_given_by_name_is_read_once(written):
    path = written(GRID, "a.toml")
    plan = Plan([path], Overrides())
    path.write_text("[")
    assert plan.refresh() == [] and len(plan.runs) == 10
    assert plan.runs[0].results == Path("results/small")


def test_a_device_that_is_not_there_is_told_before_the_start(written):
    path = written(GRID, "a.toml")
    with pytest.raises(
        FisherpruneError, match=f"{path}: device cuda:99 must be present"
    ):
        Plan([path], Overrides(device="cuda:99"))
