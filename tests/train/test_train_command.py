"""The command line of training: what it prints, and mistakes in one line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainings import SMALL_COMMAND

from fisherprune import train
from fisherprune.errors import FisherpruneError
from fisherprune.train import steps
from fisherprune.train.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_command_line(tmp_path, capsys):
    command = [*SMALL_COMMAND, "--output-dir", str(tmp_path), "--quiet"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and " epoch 1/1" not in out
    for part in ("density", "sparsity of the trained weights 0.9000", "last epoch"):
        assert part in out
    (folder,) = tmp_path.iterdir()
    assert f"written to {folder}" in out


@pytest.mark.parametrize(
    "options, message",
    [
        ("--sparsity 2", "sparsity must be a number in [0, 1], got 2.0"),
        ("--sparsity much", "argument --sparsity: must be a number, got 'much'"),
        ("--lr-drops 2 3.5", "--lr-drops: must be a whole number, got '3.5'"),
        ("--epoch 2", "unrecognized arguments: --epoch 2"),
        ("--method obs", "method must be one of none, random"),
        ("--device cuda:99", "device cuda:99 must be present"),
        ("--device cuda:99999999999999", "device must be cuda:999 at most, got"),
        ("--train-samples 5000", "train_samples must be at most the 1149 training"),
        ("--score-samples 41", "score_samples must be at most the 40 training"),
        ("--dataset folder --data-dir /nowhere", "/nowhere/train must be a folder"),
        ("--output-dir /dev/null/x", "output_dir must be a folder that can be written"),
        ("--lr 1e30 --epochs 9", "training: the loss must stay finite"),
        ("--output-dir=", "output_dir must be the name of a folder, got ''"),
        ("--resume=", "argument --resume: must be a path, got ''"),
        ("--densities=", "argument --densities: must be a path, got ''"),
        (
            "--scope densities --densities /nowhere",
            "argument --densities: densities must be in a file that can be read, got "
            "/nowhere: No such file or directory",
        ),
    ],
)
def test_mistakes_end_in_one_line(options, message, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    err = mistake(main, *SMALL_COMMAND, "--quiet", *options.split())
    assert err.startswith("fisherprune.train: error: ") and message in err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"skip": ("",)}, "ResNet has no prunable parameters"),
        ({"skip": ("",), "method": "none", "sparsity": 0}, "no prunable parameters"),
        ({"scope": "densities", "densities": {"x": 1}}, "must be of the pruned parame"),
    ],
)
def test_what_can_never_be_pruned_leaves_no_folder(small, options, message):
    with pytest.raises(FisherpruneError, match=message):
        train.run(replace(small, **options), quiet=True)
    assert list(Path(small.output_dir).iterdir()) == []


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "fisherprune.train", "--epochs", "-3"]
    source = Path(steps.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "fisherprune.train: error: epochs must be at least 0, got -3\n"
    )


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMuch detail"), "CUDA out of m"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 7 PiB\nMuch detail"), "Unable to allocate 7"),
        (
            RuntimeError(
                "[fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory"
            ),
            "can't allocate memory",
        ),
    ],
)
def test_out_of_memory_is_a_mistake_too(error, reason, monkeypatch, mistake):
    def exhaust(*args, **kwargs):
        raise error

    monkeypatch.setattr(steps, "run", exhaust)
    err = mistake(main)
    assert err.startswith(f"fisherprune.train: error: {reason}")
    assert "; a smaller --batch-size, --score-batch-size or --image-size needs" in err
    assert "detail" not in err


def test_more_memory_than_a_cpu_can_address(monkeypatch, mistake):
    monkeypatch.setattr(steps, "run", lambda *_, **__: torch.empty(2**58))
    err = mistake(main)
    assert err.startswith("fisherprune.train: error: can't allocate memory: you tried")


def test_other_runtime_errors_are_shown_as_they_are(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(steps, "run", fail)
    with pytest.raises(RuntimeError, match="^of another kind$"):
        main([])


def test_help_names_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    for part in ("mask:", "training:", "(default: fts)", "(default: 60 120)", "folder"):
        assert part in out
