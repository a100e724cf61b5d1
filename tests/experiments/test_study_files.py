"""Study files of our own, and plans of their runs."""

from dataclasses import fields
from pathlib import Path

import pytest
import result_trees as trees

from fisherprune.errors import FisherpruneError
from fisherprune.experiments.plan import Overrides, Plan
from fisherprune.experiments.published import read_published
from fisherprune.experiments.study import FIELDS, read_study
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.identity import identity

STUDIES = Path(__file__).parents[2] / "studies"


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
    assert fts == {identity(read_published(STUDIES / "reference/fts.json"))}


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
