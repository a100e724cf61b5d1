"""Which runs a study does, leaves to others and does again."""

import errno
import json
import shutil

from holders import Holder, holder_of
from small_study import STUDY, fail, write_result

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import store
from fisherprune.runs import locks
from fisherprune.runs.locks import holder


def test_what_is_finished_is_never_done_again(trained, batch, runs, capsys):
    assert batch() == 0
    assert trained.done == ["none", "snip", "fts"]
    text = capsys.readouterr().out
    assert f"[3/3] {runs['fts'].name}: finished, test accuracy 50.00 %" in text
    assert f"python -m fisherprune.report {runs['fts'].results}" in text
    before = {p: p.read_bytes() for p in runs["fts"].results.rglob("*.json")}
    assert batch() == 0
    assert trained.done == ["none", "snip", "fts"]
    assert "3  finished before" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in runs["fts"].results.rglob("*.json")} == before
    assert list(runs["fts"].locks.iterdir()) == []


def test_weights_go_unless_they_are_to_be_kept(trained, batch, runs):
    assert batch("--keep-weights") == 0
    assert (runs["fts"].folder / "best.safetensors").exists()
    shutil.rmtree(runs["fts"].folder)
    assert batch() == 0
    assert not (runs["fts"].folder / "best.safetensors").exists()
    assert (runs["snip"].folder / "best.safetensors").exists()  # finished: untouched


def test_a_failed_run_is_recorded_and_tried_again(trained, batch, runs, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "last.safetensors")
    trained.before = {
        "none": fail(FisherpruneError("no such\ndata")),
        "snip": fail(full),
    }
    assert batch() == 1
    assert trained.done == ["fts"]
    said = json.loads((runs["none"].folder / "error.json").read_text())
    assert said["error"] == "no such data"
    assert "in failing" in said["traceback"] and "T" in said["time"]
    said = json.loads((runs["snip"].folder / "error.json").read_text())["error"]
    assert said == "OSError: [Errno 28] No space left on device: 'last.safetensors'"
    assert f"{runs['snip'].name}: {said}" in capsys.readouterr().out
    assert [store.state(run) for run in runs.values()] == [
        "failed",
        "failed",
        "finished",
    ]
    trained.before = {}
    assert batch() == 0
    assert trained.done == ["fts", "none", "snip"]
    assert not (runs["none"].folder / "error.json").exists()


def test_files_put_into_the_folder_join(trained, batch, tmp_path, capsys):
    late, broken = tmp_path / "studies" / "late.toml", tmp_path / "studies" / "no.toml"

    def arrive(_):
        late.write_text(STUDY.replace('"none", "snip", "fts"', '"grasp"'))
        broken.write_text("[run")

    trained.before = {"fts": arrive}
    assert batch() == 1
    assert trained.done == ["none", "snip", "fts", "grasp"]
    text = capsys.readouterr().out
    assert text.count(f"left out: {broken}: must be a TOML file") == 2  # and at the end
    broken.unlink()
    assert batch() == 0


def test_nothing_starts_before_all_files_are_valid(trained, batch, tmp_path, capsys):
    (tmp_path / "studies" / "z.toml").write_text("[run")
    assert batch() == 2
    assert trained.done == [] and not (tmp_path / "out").exists()
    assert "experiments: error: " in capsys.readouterr().err


def test_ctrl_c_ends_the_run_and_gives_its_lock_back(trained, batch, runs, capsys):
    trained.before = {"snip": fail(KeyboardInterrupt())}
    assert batch() == 130
    assert trained.done == ["none"]
    assert list(runs["snip"].locks.iterdir()) == []
    text = capsys.readouterr().out
    assert "interrupted; the same command goes on" in text and "2  left undone" in text
    assert not (runs["snip"].folder / "error.json").exists()
    trained.before = {}
    assert batch() == 0


def test_a_run_that_is_locked_is_left_to_its_holder(trained, batch, runs, capsys):
    run = runs["none"]
    with holder_of(run.lock) as other:

        def finish(_):  # while this process does the last of the others
            run.folder.mkdir()
            write_result(run.folder, run.config)
            other.release()

        trained.before = {"fts": finish}
        assert batch() == 0
    assert trained.done == ["snip", "fts"]
    text = capsys.readouterr().out
    assert f"[1/3] {run.name}: process {other.pid} on" in text
    assert "1  finished before, or by another process" in text


def test_a_run_that_failed_in_another_process_is_not_tried_again(trained, batch, runs):
    run = runs["none"]
    with holder_of(run.lock) as other:

        def give_up(_):
            store.write_failure(run, FisherpruneError("no data"))
            other.release()

        trained.before = {"fts": give_up}
        assert batch() == 1
    assert trained.done == ["snip", "fts"]


def test_a_run_whose_process_was_killed_is_taken_over(trained, batch, runs):
    with holder_of(runs["none"].lock) as other:
        trained.before = {"fts": lambda _: other.kill()}
        assert batch() == 0
    assert trained.done == ["snip", "fts", "none"]
    assert list(runs["none"].locks.iterdir()) == []


def test_a_run_that_is_claimed_as_it_starts_is_left_to_its_holder(
    trained, batch, runs, monkeypatch
):
    run, others = runs["snip"], []

    def look(path):
        found = holder(path)
        if path == run.lock and not others:  # free when it is looked at, then held
            others.append(Holder(path))
            assert others[0].has_it()
        return found

    monkeypatch.setattr(locks, "holder", look)
    trained.before = {"fts": lambda _: others[0].release()}
    assert batch() == 0
    assert trained.done == ["none", "fts", "snip"]


def test_what_a_killed_process_left_of_a_finished_run_is_tidied(trained, batch, runs):
    assert batch("--keep-weights") == 0
    run = runs["fts"]
    with holder_of(run.lock) as other:
        other.kill()
    for left in (".checkpoint.pt.x1", "run.lock"):
        (run.folder / left).touch()
    assert batch() == 0
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json",
        "results.json",
    ]
    assert list(run.locks.iterdir()) == [] and len(trained.done) == 3
