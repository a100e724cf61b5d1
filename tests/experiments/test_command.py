"""The command line of studies."""

import errno
import shutil

import pytest
from holders import holder_of
from small_study import STUDY, fail

from fisherprune.experiments.__main__ import main


def test_a_dry_run_lists_and_makes_nothing(trained, batch, runs, tmp_path, capsys):
    assert batch("--dry-run") == 0
    assert "3 runs: 3 new" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    trained.before = {"none": fail(ValueError())}
    assert batch() == 1
    shutil.rmtree(runs["fts"].folder)
    runs["fts"].folder.mkdir()
    (runs["fts"].folder / "checkpoint.pt").touch()
    capsys.readouterr()
    assert batch(command="status") == 0
    text = capsys.readouterr().out
    assert f"{runs['fts'].name}  resumable" in text
    assert "3 runs: 1 failed, 1 finished, 1 resumable" in text
    with holder_of(runs["fts"].lock):
        assert batch(command="status") == 0
        assert f"{runs['fts'].name}  running" in capsys.readouterr().out


@pytest.fixture
def odd(runs):
    """Return the methods of the runs of shard 2/2."""
    return [m for m, run in runs.items() if int(run.identity, 16) % 2]


def test_each_run_is_in_one_shard(trained, batch, runs, odd, tmp_path, capsys):
    more = STUDY.replace('"none", "snip", "fts"', '"none", "grasp", "random"')
    (tmp_path / "studies" / "more.toml").write_text(more.replace("small", "more"))
    done = []
    for i in range(1, 5):
        assert batch("--shard", f"{i}/4", command="status") == 0
        listed = capsys.readouterr().out
        assert batch("--shard", f"{i}/4") == 0
        text = capsys.readouterr().out
        new = trained.done[len(done) :]
        assert f"\n{len(new)} runs of shard {i}/4 in " in text
        assert f"{len(new)} runs of shard {i}/4: " in listed
        done += new
    assert sorted(done) == ["fts", "grasp", "none", "random", "snip"]
    assert batch("--shard", "2/2", "--dry-run") == 0
    listed = capsys.readouterr().out
    for method, run in runs.items():
        assert (run.name in listed) == (method in odd)


def test_shards_by_identity(trained, batch, odd):
    assert batch("--shard", "2/2") == 0
    assert trained.done == odd
    assert batch("--shard", "1/1") == 0
    assert sorted(trained.done) == ["fts", "none", "snip"]


@pytest.mark.parametrize(
    "text", ["0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "a/b", "", "1/" + "9" * 5000]
)
def test_shards_that_can_not_be(trained, batch, capsys, text):
    assert batch(f"--shard={text}") == 2
    message = "--shard: must be I/N, two whole numbers with 1 <= I <= N and fewer than"
    assert message in capsys.readouterr().err
    assert trained.done == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-minutes", "0"], "--max-minutes: must be above 0, got 0"),
        (["--max-minutes", "abc"], "--max-minutes: must be a number, got 'abc'"),
        (["--gpus-per-run", "abc"], "--gpus-per-run: must be a number, got 'abc'"),
        (["--output="], "--output: must be a path, got ''"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run and --cpus-per-run are for --ex"),
        (["--gpus-per-run", "1.5"], "must be a fraction in [0, 1] or a whole number"),
        (["--executor", "slurm"], "must be one of local, ray, got 'slurm'"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:INDEX, got"),
    ],
)
def test_mistakes_on_the_command_line(trained, batch, capsys, arguments, message):
    assert batch(*arguments) == 2
    assert message in capsys.readouterr().err
    assert trained.done == []


def test_ray_that_is_not_installed(trained, batch, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert batch("--executor", "ray") == 2
    assert "pip install 'fisherprune[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["status"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "PATH" in out or not command
    assert max(map(len, out.splitlines())) <= 88


@pytest.fixture
def lockless(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", missing)


def test_a_file_system_without_locks(trained, batch, lockless, capsys):
    assert batch() == 2
    text = capsys.readouterr().err
    assert "locks must be on a file system with locks, got one without" in text
    assert len(text.splitlines()) == 1 and trained.done == []


def test_a_shard_needs_no_locks(trained, batch, runs, lockless):
    assert [batch("--shard", f"{i}/2") for i in (1, 2)] == [0, 0]
    assert sorted(trained.done) == ["fts", "none", "snip"]
    assert list(runs["fts"].locks.iterdir()) == []
