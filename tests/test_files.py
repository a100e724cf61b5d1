import os
import re
import stat

import pytest

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
