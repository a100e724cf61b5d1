"""Files that can't be read, are of others or damaged: told, and never lost."""

import errno
import shutil

import pytest
from small_study import damaged, fail

from fisherprune.experiments import store


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda r: (r.folder / "results.json").write_text('{"form'),
            "is no JSON: truncated",
        ),
        (
            lambda r: (r.folder / "results.json").write_text("[1]"),
            "must be a JSON obje",
        ),
        (damaged(lambda c: c.pop("format")), "format must be 1, got None"),
        (damaged(lambda c: c["config"].update(seed=9)), "config must be that of run"),
        (
            damaged(lambda c: c["config"].update(new=9)),
            "config must be a configuration",
        ),
        (damaged(lambda c: c["config"].update(lr=-1)), "config: lr must be above 0"),
        (damaged(lambda c: c["test"].pop("best")), "test.best.loss must be a number"),
        (
            damaged(lambda c: c["test"]["best"].update(loss=10**400)),
            "test.best.loss must be a number, got 1000",
        ),
        (
            damaged(lambda c: c["seconds"].update(training=10**400)),
            "seconds must be numbers by phase, got {'training': 1000",
        ),
        (
            damaged(lambda c: c["config"].update(densities={"a": 10**400})),
            "config: ",
        ),
        (damaged(lambda c: c.pop("seconds")), "seconds must be numbers by phase"),
    ],
)
def test_damaged_results_are_told_and_left_alone(
    trained, batch, runs, capsys, spoil, message
):
    assert batch() == 0
    shutil.rmtree(runs["fts"].folder)
    path = runs["snip"].folder / "results.json"
    spoil(runs["snip"])
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
        ('{"format": 2}', "format must be 1, got 2: these are results of another ver"),
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
