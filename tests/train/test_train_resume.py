"""A run that was ended, whenever, goes on and ends in the same bits."""

import errno
import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import Stop, contents, stopped

from fisherprune import train
from fisherprune.runs.device import device_name
from fisherprune.runs.folder import RunFolder
from fisherprune.runs.metrics import Metrics
from fisherprune.train import steps, trainer
from fisherprune.train.__main__ import main
from fisherprune.train.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(small):
    return replace(small, warmup_epochs=1, epochs=3, lr=0.05, lr_drops=(2,))


def stop_at(monkeypatch, owner, name, call, after=False):
    """Let the ``call``-th call of a function end the run, before or after it."""
    calls, original = [], getattr(owner, name)

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Stop
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, stopping)


STOPS = {
    "in the first epoch": (trainer, "evaluate", 1),
    "in a later epoch": (trainer, "evaluate", 3),
    "before the row": (RunFolder, "add_epoch", 2),
    "after the row": (RunFolder, "add_epoch", 3, True),
    "before the first checkpoint": (Checkpoint, "save", 1),
    "before the mask": (steps, "make_masks", 1),
    "after the mask": (steps, "make_masks", 1, True),
    "after the mask's file": (RunFolder, "save_masks", 1, True),
    "after the mask's checkpoint": (Checkpoint, "save", 2, True),
    "between the checkpoint and the best weights": (RunFolder, "save_weights", 1),
    "after the best weights": (RunFolder, "save_weights", 1, True),
    "after all epochs": (Checkpoint, "save", 5, True),
    "after the last weights": (steps.Steps, "test", 1),
    "in the test": (steps, "evaluate", 1, True),
    "before the result": (RunFolder, "write_json", 2),
}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Return the contents of an undisturbed run, for each config."""
    known = {}

    def of(config):
        key = json.dumps(asdict(replace(config, output_dir="-")))
        if key not in known:
            folder = tmp_path_factory.mktemp("truth") / "run"
            train.run(config, folder=folder, quiet=True)
            known[key] = contents(folder)
        return known[key]

    return of


def stopped_and_resumed(config, folder, monkeypatch, place, between=lambda: None):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, *place)
        train.run(config, folder=folder, quiet=True)
    between()
    train.run(config, folder=folder, quiet=True)
    assert not (folder / "checkpoint.pt").exists() and not list(folder.glob(".*"))
    return contents(folder)


@pytest.mark.parametrize("moment", STOPS)
def test_a_run_ends_the_same_wherever_it_was_stopped(
    small, moment, monkeypatch, tmp_path, truth
):
    found = stopped_and_resumed(small, tmp_path / "run", monkeypatch, STOPS[moment])
    assert found == truth(small)


def test_the_best_weights_are_written_even_if_the_last_moment_was_missed(
    small, tmp_path, monkeypatch, truth
):
    config = replace(small, epochs=1)  # so no later epoch writes them
    place = STOPS["between the checkpoint and the best weights"]
    found = stopped_and_resumed(config, tmp_path / "run", monkeypatch, place)
    assert found == truth(config)


VARIANTS = {
    "amp": {"amp": True},
    "contiguous": {"memory_format": "contiguous"},
    "bn_warmup": {"bn_warmup": True, "warmup_epochs": 0},
    "reinitialize": {"reinitialize": True, "shuffle_masks": True},
    "dense": {"method": "none", "sparsity": 0.0},
    "validation": {"validation_every": 2, "validation_metric": "f1"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_every_checkpoint_ends_the_same(
    small, variant, tmp_path, truth
):
    config = replace(small, **VARIANTS[variant])
    checkpoints = config.warmup_epochs + (config.method != "none") + config.epochs
    for _ in range(checkpoints):
        stopped(config, tmp_path)
    train.run(config, folder=tmp_path, quiet=True, checkpointed=pytest.fail)
    assert contents(tmp_path) == truth(config)


class Background(Checkpoint):
    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"background": True})


def test_a_checkpoint_waits_for_the_hash_of_the_best_weights(
    small, tmp_path, monkeypatch
):
    save = RunFolder.save_weights

    def slowly(*args):
        time.sleep(0.5)
        return save(*args)

    monkeypatch.setattr(steps, "Checkpoint", Background)
    monkeypatch.setattr(RunFolder, "save_weights", slowly)
    stop_after_the_best(replace(small, epochs=4), tmp_path, monkeypatch)
    train.run(replace(small, epochs=4), folder=tmp_path, quiet=True)


def test_the_background_writer_keeps_the_order(small, tmp_path, monkeypatch, truth):
    """On a GPU checkpoints are written while the next epoch trains."""
    monkeypatch.setattr(steps, "Checkpoint", Background)
    place = STOPS["in a later epoch"]
    found = stopped_and_resumed(small, tmp_path, monkeypatch, place)
    assert found == truth(small)


def test_what_a_killed_process_was_writing_is_deleted(
    small, tmp_path, monkeypatch, truth
):
    def left():
        (tmp_path / ".checkpoint.pt.tail").write_bytes(b"of one killed while it wrote")

    place = STOPS["in a later epoch"]
    found = stopped_and_resumed(small, tmp_path, monkeypatch, place, left)
    assert found == truth(small)


def test_ctrl_c_says_how_to_go_on(small, tmp_path, monkeypatch, capsys, truth):
    RunFolder(small, tmp_path).close()
    command = ["--resume", str(tmp_path), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(
            steps, "make_masks", lambda *_: signal.raise_signal(signal.SIGINT)
        )
        assert main(command) == 130
    again = f"python -m fisherprune.train --resume {tmp_path}"
    err = capsys.readouterr().err
    assert err == f"fisherprune.train: interrupted; {again} goes on\n"
    assert main(command) == 0
    assert contents(tmp_path) == truth(small)


def test_a_full_disk_says_so_and_the_run_goes_on_later(
    small, tmp_path, monkeypatch, mistake, truth
):
    RunFolder(small, tmp_path)
    calls, fsync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        err = mistake(main, "--resume", tmp_path, "--quiet")
    assert f"No space left on device: '{tmp_path}/" in err and "make room" in err
    assert len(calls) == 13 and (tmp_path / "checkpoint.pt").exists()
    train.run(small, folder=tmp_path, quiet=True)
    assert contents(tmp_path) == truth(small)


def test_a_damaged_checkpoint_names_itself(small, tmp_path, mistake, truth):
    stopped(small, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    err = mistake(main, "--resume", tmp_path, "--quiet")
    assert f"checkpoint {checkpoint} is damaged; delete it to begin the run" in err
    checkpoint.unlink()
    train.run(small, folder=tmp_path, quiet=True)
    assert contents(tmp_path) == truth(small)


def garble(path):
    path.write_bytes(b"\xff" * 200)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def make_folder(path):
    path.unlink()
    path.mkdir()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def take_others(path):
    save_file({name: x + 1 for name, x in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (truncate, "is not as the run wrote it"),
        (garble, "is not as the run wrote it"),
        (flip_a_bit, "is not as the run wrote it"),
        (take_others, "is not as the run wrote it"),
        (Path.unlink, "is missing"),
        (make_folder, "is no file"),
    ],
)
def test_damaged_best_weights_end_a_resumed_run_at_once(
    small, spoil, reason, tmp_path, monkeypatch, mistake
):
    stop_after_the_best(small, tmp_path, monkeypatch)
    best = tmp_path / "best.safetensors"
    spoil(best)
    monkeypatch.setattr(steps.Trainer, "epoch", None)  # nothing is trained
    err = mistake(main, "--resume", tmp_path, "--quiet")
    assert f"weights of the run must be in {best}, which {reason}" in err
    assert "; the run can't be resumed, start it anew in another folder" in err


def stop_after_the_best(config, folder, monkeypatch):
    """Stop a run at the checkpoint after an epoch that is not its best."""
    values = iter((0.1, 0.5, 0.25, 0.2))

    def validation(*args):
        value = next(values)
        return Metrics(1.0, value, value, value, value)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", validation)
        stopped(config, folder, 4)  # warm-up, mask, the best epoch, another one


@pytest.mark.parametrize(
    "moment, spoil, name",
    [
        ("in a later epoch", flip_a_bit, "masks"),
        ("between the checkpoint and the best weights", garble, "best"),
    ],
)
def test_what_is_written_anew_may_be_damaged(
    small, moment, spoil, name, tmp_path, monkeypatch, truth
):
    def damage():
        spoil(tmp_path / f"{name}.safetensors")

    place = STOPS[moment]
    found = stopped_and_resumed(small, tmp_path, monkeypatch, place, damage)
    assert found == truth(small)


def test_another_device_is_noted(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(steps, "device_name", lambda device: "fast GPU")
        stopped(small, tmp_path)
    result = train.run(small, folder=tmp_path, quiet=True)
    here = device_name(torch.device("cpu"))
    assert result.notes == (f"trained on fast GPU, then {here}: no device repeats it",)
    assert result.notes[0] in result.as_json()["warnings"]


def test_one_process_at_a_time_does_a_run(small, tmp_path, mistake, truth):
    folder = tmp_path / "run"
    refused = f"error: folder must be of a run that no other process does, got {folder}"

    def try_too():
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert refused in mistake(main, "--resume", folder, "--quiet")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    train.run(small, folder=folder, quiet=True, checkpointed=try_too)
    assert contents(folder) == truth(small)
    assert not (folder / "run.lock").exists()
