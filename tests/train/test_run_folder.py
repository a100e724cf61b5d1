"""Folders in which a run can not go on: finished, damaged, of others, in use."""

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trainings import stopped

from fisherprune import train
from fisherprune.errors import FisherpruneError
from fisherprune.runs.folder import RunFolder, read_config
from fisherprune.train import steps
from fisherprune.train.__main__ import main

SOURCE = Path(steps.__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(small):
    return replace(small, warmup_epochs=1, epochs=3, lr=0.05, lr_drops=(2,))


def test_a_finished_run_is_not_done_again(small, tmp_path, mistake):
    train.run(replace(small, epochs=0), folder=tmp_path, quiet=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"of one killed before it was deleted")
    (tmp_path / ".results.json.x1").write_bytes(b"of one killed while it wrote")
    err = mistake(main, "--resume", tmp_path)
    assert f"must be of an unfinished run, got {tmp_path}, which holds results." in err
    assert not (tmp_path / "checkpoint.pt").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", ["", '{"format": 1}'])
def test_a_checkpoint_beside_a_damaged_result_stays(small, tmp_path, content, mistake):
    stopped(small, tmp_path)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "results.json").write_text(content)
    err = mistake(main, "--resume", tmp_path)
    assert f"error: {tmp_path / 'results.json'}: " in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint


def test_a_result_of_another_run_deletes_no_checkpoint(small, tmp_path):
    other = train.run(replace(small, seed=9, epochs=0), quiet=True)
    stopped(small, tmp_path)
    shutil.copy(other.folder / "results.json", tmp_path)
    with pytest.raises(FisherpruneError, match="which holds results.json"):
        train.run(small, folder=tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_process_that_is_paused_keeps_its_run(small, tmp_path, mistake):
    RunFolder(replace(small, epochs=10**5), tmp_path).close()
    command = [sys.executable, "-m", "fisherprune.train", "--resume", tmp_path]
    process = subprocess.Popen(
        command, cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()  # the first epoch
        process.send_signal(signal.SIGSTOP)
        err = mistake(main, "--resume", tmp_path, "--quiet")
        holder = f"got {tmp_path}: process {process.pid} on"
        assert f"that no other process does, {holder}" in err
    finally:
        process.kill()
        process.communicate()
    with RunFolder(read_config(tmp_path), tmp_path) as folder:  # it is free again
        assert folder.path == tmp_path


def test_a_file_system_without_locks(small, tmp_path, monkeypatch):
    asked = []

    def flock(handle, operation):
        asked.append(handle)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    result = train.run(replace(small, epochs=0), folder=tmp_path, quiet=True)
    assert asked and (result.folder / "results.json").exists()


def test_a_folder_of_another_run_is_refused(small, tmp_path):
    RunFolder(small, tmp_path)
    with pytest.raises(FisherpruneError, match="whose run differs in seed, lr"):
        train.run(replace(small, lr=0.1, seed=3), folder=tmp_path)
    RunFolder(replace(small, output_dir="elsewhere"), tmp_path)


def test_folders_that_hold_no_run(small, tmp_path, mistake):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FisherpruneError, match="holds results.json but no config"):
        train.run(small, folder=tmp_path)
    with pytest.raises(FisherpruneError, match="folder must be a folder that can be"):
        train.run(small, folder=tmp_path / "results.json")
    err = mistake(main, "--resume", tmp_path / "absent")
    assert "a run's folder must hold config.json, but" in err and "absent" in err


def test_resume_takes_no_other_settings(mistake):
    err = mistake(main, *"--resume runs/a --epochs 160 --bn-warmup".split())
    assert "got --epochs, --bn-warmup too" in err
