"""Files that can't be read, are of others or damaged: told, and never lost."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import result_trees as trees
from small_study import fail

from fisherprune.experiments import store
from fisherprune.experiments.estimate import seconds_needed


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_text('{"form'), "is no JSON: truncated"),
        (lambda path: trees.change(path, "config/seed", 9), "config must be that of r"),
        (lambda path: trees.change(path, "config/lr", -1), "config.lr must be above 0"),
        (lambda path: trees.change(path, "seconds"), "seconds is missing"),
    ],
)
def test_damaged_results_are_told_and_left_alone(
    trained, batch, runs, capsys, spoil, message
):
    assert batch() == 0
    shutil.rmtree(runs["fts"].folder)
    path = runs["snip"].folder / "results.json"
    spoil(path)
    before = path.read_bytes()
    assert batch() == 1
    text = capsys.readouterr().out
    assert f"{path}: {message}" in text and "move the run's folder away" in text
    assert path.read_bytes() == before
    assert trained.done[3:] == ["fts"]
    assert batch(command="status") == 0
    assert f"damaged: {path}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"seed": 3}', '{"se'])
def test_a_folder_of_another_run_is_not_touched(trained, batch, runs, capsys, text):
    path = runs["snip"].folder / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert batch() == 1
    assert f"{path}: " in capsys.readouterr().out
    assert path.read_text() == text and trained.done == ["none", "fts"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"format": 2}', "format must be 1, got 2: not written by this version of"),
        ("results", "is no JSON: truncated"),
    ],
)
def test_results_of_another_version_are_left_alone(
    trained, batch, tmp_path, capsys, text, message
):
    mark = tmp_path / "out" / "fisherprune-results.json"
    mark.parent.mkdir()
    mark.write_text(text)
    assert batch() == 2
    assert f"error: {mark}: {message}" in capsys.readouterr().err
    assert trained.done == [] and [p.name for p in mark.parent.iterdir()] == [mark.name]


def test_a_disk_too_full_for_the_error_does_not_end_the_batch(
    trained, batch, runs, monkeypatch, capsys
):
    trained.before = {"none": fail(ValueError("bad"))}
    real = store.write_text

    def full(path, text):
        if path.name == "error.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(store, "write_text", full)
    assert batch() == 1
    assert trained.done == ["snip", "fts"]
    assert "bad (and error.json can't be written: No space" in capsys.readouterr().out


@pytest.fixture
def closed(monkeypatch, runs):
    """Let nobody look into a run's folder, as where permissions forbid it."""
    exists = Path.exists

    def looked(path):
        if path.parent == runs["snip"].folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", looked)


def test_a_run_that_can_not_be_looked_at_is_one_runs_trouble(
    trained, batch, runs, closed, capsys
):
    line = f"PermissionError: [Errno 13] Permission denied: '{runs['snip'].folder}"
    assert batch() == 1
    text = capsys.readouterr().out
    assert f"{runs['snip'].name}: failed, {line}" in text
    assert trained.done == ["none", "fts"] and "1  failed" in text
    assert batch(command="status") == 0
    text = capsys.readouterr().out
    assert f"{runs['snip'].name}  unreadable: {line}" in text
    assert "3 runs: 2 finished, 1 unreadable" in text


def test_a_lock_that_can_not_be_taken_is_one_runs_trouble(trained, batch, runs, capsys):
    runs["snip"].lock.mkdir(parents=True)
    assert batch() == 1
    assert trained.done == ["none", "fts"]
    assert f"{runs['snip'].name}: failed, IsADirectoryError" in capsys.readouterr().out
    assert runs["snip"].lock.is_dir() and not runs["snip"].folder.exists()


@pytest.mark.parametrize("text", [b"a" * 200_000, b"\xff\n\xff"])
def test_epochs_that_can_not_be_read_count_as_none(trained, batch, runs, text):
    assert batch() == 0
    run = runs["fts"]
    (run.folder / "checkpoint.pt").touch()
    (run.folder / "metrics.csv").write_bytes(b"epoch\n" + text)
    assert seconds_needed(run) == 6.0


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", ""])
def test_an_output_folder_that_has_no_name(trained, batch, exp, tmp_path, capsys, name):
    exp["general"] |= {"output_dir": name, "gpu": {"ngpus": 0, "gpu_id": 0}}
    late = tmp_path / "studies" / "late.json"
    trained.before = {"none": lambda _: late.write_text(json.dumps(exp))}
    assert batch() == 1
    assert trained.done == ["none", "snip", "fts"]
    line = f"{late}: general.output_dir must be the name of a folder, got {name!r}"
    assert f"left out: {line}" in capsys.readouterr().out
    assert batch() == 2
    assert capsys.readouterr().err == f"fisherprune.experiments: error: {line}\n"


def test_an_output_folder_whose_name_is_too_long(trained, batch, tmp_path, capsys):
    assert batch("--output", str(tmp_path / ("x" * 300))) == 2
    message = "x: results must go into a folder that can be written to: File name too"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "seed", ["0x1" + "0" * 5000, "1" + "0" * 100, "-1" + "0" * 100]
)
def test_a_seed_that_no_name_can_hold(trained, batch, tmp_path, capsys, seed):
    path = tmp_path / "studies" / "small.toml"
    path.write_text(
        path.read_text().replace("epochs = 4", f"epochs = 4\nseed = {seed}")
    )
    assert batch() == 2
    assert "run.seed must be of at most 100 digits, got " in capsys.readouterr().err
    path.write_text(path.read_text().replace(seed, "9" * 100))
    assert batch() == 0
