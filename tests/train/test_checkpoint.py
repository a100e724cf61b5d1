"""Checkpoint files: whole, checked, and of one run."""

import errno
import hashlib
import io
import os
import threading
import zipfile

import pytest
import torch
from trainings import small_run, stopped

from fisherprune import train
from fisherprune.errors import FisherpruneError
from fisherprune.train import checkpoint, steps
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
        go.wait()
        write(*args)

    monkeypatch.setattr(checkpoint, "write_bytes", slowly)
    state = {"weights": torch.zeros(3), "rows": [1]}
    saved, then = Checkpoint(path, "a", background=True), []
    saved.save(state, lambda found: then.append((path.exists(), found["weights"])))
    state["weights"] += 1
    state["rows"].append(2)
    try:
        assert not path.exists() and not then
    finally:
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


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Return a run that was stopped after its first epoch, and its state."""
    folder = tmp_path_factory.mktemp("run") / "a"
    config = small_run(warmup_epochs=1, epochs=2)
    stopped(config, folder, 3)
    path = folder / "checkpoint.pt"
    state = torch.load(io.BytesIO(path.read_bytes()[len(MAGIC) + 32 :]))
    return config, folder, state


def written(content):
    """Return a file whose checksum is right, whatever its content."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    return MAGIC + hashlib.sha256(content).digest() + content


def script():
    """Return what torch.load takes for a TorchScript archive."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/constants.pkl", b"")
    return buffer.getvalue()


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def changed(key, value):
    """Return what replaces a value of the state by another, or by one made of it."""

    def change(state):
        new = value(state[key]) if callable(value) else value
        return state | {key: new}

    return change


def shorter(tensors):
    return dict(list(tensors.items())[1:])


def reshaped(tensors):
    return {name: tensor[None] for name, tensor in tensors.items()}


def as_doubles(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


KEYS = (
    "run model optimizer order augmentation masks rows done seconds best_epoch "
    "best_value laps devices scoring best_sha256"
).split()
OTHERS = [
    *(without(key) for key in KEYS),
    *(changed(key, ["x"]) for key in KEYS if key not in ("run", "devices")),
    *(changed(key, None) for key in KEYS[1:-2] if key != "masks"),
    *(changed(key, shorter) for key in ("model", "masks", "done", "laps")),
    *(changed(key, reshaped) for key in ("model", "masks")),
    *(changed(key, as_doubles) for key in ("model", "masks")),
    changed("devices", [3]),
    changed("rows", lambda rows: [rows[0] | {"lr": "a"}]),
    changed("rows", lambda rows: rows * 2),
    changed("rows", lambda rows: [{}]),
    changed("done", {"warmup": 1, "train": 3}),
    changed("done", {"warmup": 1, "train": -1}),
    changed("best_epoch", 2),
    changed("order", lambda x: x[:-1]),
    changed("order", torch.zeros_like),
    changed("optimizer", lambda x: x | {999: x[0]}),
    changed("optimizer", lambda x: {0: {"momentum_buffer": torch.ones(1)}}),
    changed("optimizer", lambda x: {"a": x[0]}),
    lambda state: [state],
    lambda state: torch.zeros(3),
    lambda state: {},
    lambda state: b"",
    lambda state: b"not a file of torch.save",
    lambda state: script(),
]


@pytest.mark.parametrize("change", OTHERS)
def test_whole_files_that_hold_something_else_are_refused(
    interrupted, change, monkeypatch
):
    config, folder, state = interrupted
    path = folder / "checkpoint.pt"
    path.write_bytes(written(change(dict(state))))
    monkeypatch.setattr(steps.Trainer, "epoch", None)  # nothing is trained
    message = f"^checkpoint {path} must hold the state of this run, got .*; delete it"
    with pytest.raises(FisherpruneError, match=message):
        train.run(config, folder=folder, quiet=True)


def test_the_state_itself_is_accepted(interrupted):
    config, folder, state = interrupted
    (folder / "checkpoint.pt").write_bytes(written(dict(state)))
    stopped(config, folder)
