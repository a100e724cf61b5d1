"""Checkpoint files: whole, checked, and of one run."""

import errno
import os
import threading

import pytest
import torch

from fisherprune.errors import FisherpruneError
from fisherprune.train import checkpoint
from fisherprune.train.checkpoint import MAGIC, Checkpoint

STATE = {
    "tensor": torch.arange(1000.0),
    "nested": {0: {"momentum": torch.ones(2), "none": None}},
    "rows": [{"phase": "train", "loss": 0.1}],
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def assert_same(a, b):
    assert torch.equal(a["tensor"], b["tensor"]) and a["rows"] == b["rows"]
    assert torch.equal(a["nested"][0]["momentum"], b["nested"][0]["momentum"])
    assert a["nested"][0]["none"] is None


@pytest.mark.parametrize("background", [False, True])
def test_a_state_comes_back(path, background):
    written = []
    saved = Checkpoint(
        path, "a", background=background, written=lambda: written.append(path.exists())
    )
    assert saved.load() is None
    saved.save(STATE)
    saved.wait()
    assert_same(saved.load(), STATE)
    assert written == [True]
    saved.remove()
    assert saved.load() is None
    saved.close()


def test_formats_of_memory_come_back(path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for background in (False, True):
        saved = Checkpoint(path, "a", background=background)
        saved.save({"weight": weight})
        saved.wait()
        assert saved.load()["weight"].stride() == weight.stride()


def test_the_background_writes_the_state_of_when_it_was_saved(path, monkeypatch):
    go, write = threading.Event(), checkpoint.write_bytes

    def slowly(*args):
        go.wait(10)
        write(*args)

    monkeypatch.setattr(checkpoint, "write_bytes", slowly)
    state = {"weights": torch.zeros(3), "rows": [1]}
    saved, then = Checkpoint(path, "a", background=True), []
    saved.save(state, lambda found: then.append((path.exists(), found["weights"])))
    state["weights"] += 1
    state["rows"].append(2)
    assert not path.exists() and not then
    go.set()
    saved.wait()
    loaded = saved.load()
    assert not loaded["weights"].any() and loaded["rows"] == [1]
    ((existed, weights),) = then
    assert existed and not weights.any()


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_old_one(path, monkeypatch, background):
    saved = Checkpoint(path, "a", background=background)
    saved.save(STATE)
    saved.wait()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*checkpoint.pt'"):
        saved.save({"tensor": torch.zeros(2)})
        saved.wait()
    saved.close()
    assert_same(saved.load(), STATE)
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def flipped(content, position):
    content = bytearray(content)
    content[position] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda content: b"", "is no checkpoint of this version"),
        (lambda content: content[:10], "is no checkpoint of this version"),
        (lambda content: content[: len(MAGIC) + 5], "is damaged"),
        (lambda content: content[: len(content) // 2], "is damaged"),
        (lambda content: content[:-1], "is damaged"),
        (lambda content: content + b"x", "is damaged"),
        (lambda content: flipped(content, len(content) // 2), "is damaged"),
        (lambda content: flipped(content, len(MAGIC)), "is damaged"),
        (lambda content: b"PK" + content, "is no checkpoint of this version"),
    ],
)
def test_damaged_and_foreign_files_are_refused(path, damage, reason):
    saved = Checkpoint(path, "a")
    saved.save(STATE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FisherpruneError, match=f"checkpoint.pt {reason}.*; delete it"):
        saved.load()


def test_that_of_another_run_is_refused(path):
    Checkpoint(path, "a").save(STATE)
    with pytest.raises(FisherpruneError, match="must be of run b, got a"):
        Checkpoint(path, "b").load()
