"""Runs on a GPU: killed ones end in the same bits, all in those of the CPU, rounded."""

import json
import math
import signal
from dataclasses import asdict, replace

import pytest
from gpus import DEVICES, needs_gpu
from moment_checks import run_python
from trainings import contents, rows, small_run

from fisherprune import Masks, train

pytestmark = pytest.mark.usefixtures("one_thread")

KILLED = """
import json, os, signal
from pathlib import Path
from fisherprune import train
from fisherprune.runs.config import TrainConfig

left = iter(range({checkpoints}))

def checkpointed():
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)

config = TrainConfig(**json.loads({config!r}))
train.run(config, folder=Path({folder!r}), quiet=True, checkpointed=checkpointed)
"""
VARIANTS = {
    "before the mask": (0, {"warmup_epochs": 1}),
    "in bfloat16": (1, {"amp": True}),
    "contiguous": (2, {"memory_format": "contiguous", "method": "grasp"}),
}


@pytest.mark.parametrize(
    ("variant", "device"),
    [
        ("before the mask", "cpu"),
        *(pytest.param(each, "cuda", marks=needs_gpu) for each in VARIANTS),
    ],
)
def test_a_killed_run_ends_in_the_same_bits(variant, device, tmp_path):
    checkpoints, options = VARIANTS[variant]
    config = small_run(device=device, epochs=3, lr=0.05, **options)
    calm, folder = tmp_path / "calm", tmp_path / "killed"
    train.run(config, folder=calm, quiet=True)
    text = json.dumps(asdict(config))
    script = KILLED.format(config=text, folder=str(folder), checkpoints=checkpoints)
    killed = run_python(script)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "checkpoint.pt").exists()
    train.run(config, folder=folder, quiet=True)
    assert contents(folder) == contents(calm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["fts", "grasp", "obd"])
def test_a_run_is_that_of_the_cpu_but_rounded(method, device, tmp_path, tf32):
    tf32("ieee")
    config = small_run(device=device, method=method, lr=1e-4)
    folders = [tmp_path / "there", tmp_path / "cpu"]
    for folder, place in zip(folders, (device, "cpu"), strict=True):
        train.run(replace(config, device=place), folder=folder, quiet=True)
    there, here = (Masks.load(folder / "masks.safetensors") for folder in folders)
    assert there.kept() == here.kept() and there.jaccard(here) > 0.95
    for ours, expected in zip(*map(rows, folders), strict=True):
        for column in ("train_loss", "validation_loss"):
            value, wanted = float(ours[column]), float(expected[column])
            assert math.isclose(value, wanted, rel_tol=1e-2), column
