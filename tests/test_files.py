import os
import re
import stat

import pytest
import torch

from fisherprune import Masks
from fisherprune.errors import FisherpruneError
from fisherprune.files import read_json, whole_file, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    def change(mask):
        raise AssertionError("another thread's files would have other permissions")

    monkeypatch.setattr(os, "umask", change)
    write_text(tmp_path / "a.txt", "x")


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.touch()
    path.chmod(mode)
    with whole_file(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == mode  # before it has content
        temporary.write_text("secret")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "secret"


def test_masks_have_the_permissions_of_the_umask(tmp_path):
    masks = Masks({"weight": torch.tensor([True])})
    masks.save(tmp_path / "masks.safetensors")
    write_text(tmp_path / "a.txt", "x")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    masks = Masks({"weight": torch.tensor([True])})
    with pytest.raises(FisherpruneError, match="pipe must be a file or not be there"):
        masks.save(path)
    with pytest.raises(FisherpruneError, match="/dev/null must be a file or not be th"):
        write_text("/dev/null", "x")
    assert stat.S_ISFIFO(path.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"a": 1', ": is no JSON: truncated"),
        (b"\xff\xfe", ": is no JSON: truncated"),
        (b"[" * 100_000, ": is no JSON: truncated"),
        (b"[1]", r": must be a JSON object, got \[1\]$"),
        (b'"' + b"x" * 100 + b'"', r": must be a JSON object, got 'x{56}\.\.\.$"),
        (None, ": can't be read: No such file"),
    ],
)
def test_what_is_no_json_object_is_told(tmp_path, data, message):
    path = tmp_path / "some.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FisherpruneError, match=re.escape(str(path)) + message):
        read_json(path)


def test_a_json_object_comes_back(tmp_path):
    write_text(tmp_path / "some.json", '{"a": [1, null]}')
    assert read_json(tmp_path / "some.json") == {"a": [1, None]}
