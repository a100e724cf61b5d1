"""How long runs take, from those that are finished."""

import shutil
from dataclasses import replace

import pytest
import result_trees as trees
from small_study import STUDY

from fisherprune.experiments.estimate import seconds_needed


def test_max_minutes_starts_nothing_that_would_not_fit(
    trained, batch, capsys, tmp_path
):
    trained.seconds = 90.0
    assert batch("--max-minutes", "1") == 1
    assert trained.done == ["none"]  # nobody knows yet how long it takes
    text = capsys.readouterr().out
    assert "2  left undone" in text
    assert "needs about 1:30 min, " in text and " are left" in text
    assert batch("--max-minutes", "2") == 0
    longer = STUDY.replace("epochs = 4", "epochs = 8").replace('"none", ', "")
    (tmp_path / "studies" / "small.toml").write_text(longer)
    assert batch("--max-minutes", "2") == 1
    assert "needs about 3:00 min" in capsys.readouterr().out


def test_an_interrupted_run_needs_less(trained, batch, runs):
    assert seconds_needed(runs["fts"]) is None
    assert batch() == 0
    run = runs["fts"]
    assert seconds_needed(run) == 6.0
    (run.folder / "checkpoint.pt").touch()
    (run.folder / "metrics.csv").write_text("epoch\n1\n2\n3\n")
    assert seconds_needed(run) == 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"amp": True},
        {"compile": True},
        {"memory_format": "contiguous"},
        {"validation_every": 2},
    ],
)
def test_runs_whose_epochs_take_another_time_tell_nothing(trained, batch, runs, change):
    assert batch() == 0
    other = replace(runs["fts"], config=replace(runs["fts"].config, **change))
    assert seconds_needed(other) is None


@pytest.mark.parametrize(
    "place, value",
    [
        ("config/epochs", 10**400),
        ("seconds", [1]),
        ("seconds", {"a": "1"}),
        ("seconds", {"a": 1e308}),
    ],
)
def test_results_that_are_damaged_tell_nothing_of_other_runs(
    trained, batch, runs, place, value
):
    assert batch() == 0
    trees.change(runs["none"].folder / "results.json", place, value)
    assert seconds_needed(runs["fts"]) == 6.0
    shutil.rmtree(runs["fts"].folder)
    assert batch("--max-minutes", "1") == 1
    assert trained.done == ["none", "snip", "fts", "fts"]
