"""Cached statistics: what was kept comes back, what is damaged never does."""

import os
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

import fisherprune as fp
from fisherprune.statistics.cache import StatisticsCache
from fisherprune.statistics.passes import ModelStatistics

A, B = torch.zeros(3, 4), torch.zeros(2)
LIKE = {"m": {"a": A, "b": B}, "F": {"a": A}}


class Pass:
    """A pass that counts how often it is run."""

    def __init__(self):
        self.runs = 0
        self.parts = {
            part: {name: torch.randn_like(tensor) for name, tensor in named.items()}
            for part, named in LIKE.items()
        }

    def __call__(self):
        self.runs += 1
        seconds = 0.1 + self.runs
        return ModelStatistics(self.parts, samples=7, group_size=2, seconds=seconds)


def assert_same(found, made):
    assert (found.samples, found.group_size, found.groups) == (7, 2, 4)
    assert found.parts.keys() == made.parts.keys()
    for part, named in made.parts.items():
        assert found.parts[part].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(found.parts[part][name], tensor)


def test_the_second_time_it_is_read(tmp_path, capfd):
    made, cache = Pass(), StatisticsCache(tmp_path / "new" / "folder")
    first = cache.get("key", LIKE, made)
    second = StatisticsCache(cache.folder).get("key", LIKE, made)
    assert made.runs == 1 and not first.cached and second.cached
    assert first.seconds == second.seconds == 1.1
    assert_same(first, made)
    assert_same(second, made)
    assert [p.name for p in cache.folder.iterdir()] == ["key.safetensors"]
    cache.get("other", LIKE, made)
    assert made.runs == 2 and capfd.readouterr() == ("", "")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def _flip(at):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)

    return flip


def _replace(old, new):
    def replace(path):
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return replace


DAMAGES = {
    "truncated": _cut,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(os.urandom(300)),
    "text": lambda path: path.write_text("not what you think"),
    "one bit of a tensor": _flip(-3),
    "the header's length": _flip(0),
    "samples": _replace(b'"samples":"7"', b'"samples":"8"'),
    "no number": _replace(b'"samples":"7"', b'"samples":"x"'),
    "the group size": _replace(b'"group_size":"2"', b'"group_size":"1"'),
    "no samples": _replace(b'"samples":"7"', b'"simples":"7"'),
    "another version": _replace(b"statistics-3", b"statistics-1"),
    "masks": lambda path: fp.Masks({"a": torch.ones(3) > 0}).save(path),
    "no metadata": lambda path: save_file({"m/a": torch.ones(3, 4)}, path),
    "another key": lambda path: os.replace(path.with_stem("other"), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_files_are_computed_again(damage, tmp_path, capfd):
    made, cache = Pass(), StatisticsCache(tmp_path)
    cache.get("key", LIKE, made)
    cache.get("other", LIKE, made)
    DAMAGES[damage](tmp_path / "key.safetensors")
    assert_same(cache.get("key", LIKE, made), made)
    assert made.runs == 3
    out, err = capfd.readouterr()
    notices = err.splitlines()
    assert out == "" and "key.safetensors can't be used, computing them" in notices[0]
    if damage != "a folder":  # which no file can replace
        assert len(notices) == 1
        assert cache.get("key", LIKE, made).cached and made.runs == 3


def test_tensors_of_another_shape_are_computed_again(tmp_path, capfd):
    made, cache = Pass(), StatisticsCache(tmp_path)
    for like in (LIKE, LIKE | {"m": {"a": A, "b": A}}, {"m": {"a": A}}):
        cache.get("key", like, made)
    assert made.runs == 3
    assert capfd.readouterr().err.count("tensors are of another network") == 2


def test_a_full_disk_costs_the_cache_alone(tmp_path, monkeypatch, capfd):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    made, cache = Pass(), StatisticsCache(tmp_path)
    assert_same(cache.get("key", LIKE, made), made)
    err = capfd.readouterr().err
    assert f"can't be kept in {tmp_path / 'key.safetensors'}: [Errno 28] No sp" in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        fp.FisherpruneError, match="statistics must be .*/file/x: Not a"
    ):
        StatisticsCache(tmp_path / "file" / "x")


def test_the_lock_is_held_around_the_pass_alone(tmp_path):
    held, made = [], Pass()

    @contextmanager
    def lock(key):
        held.append(key)
        yield
        assert (tmp_path / f"{key}.safetensors").exists()
        held.append("free")

    cache = StatisticsCache(tmp_path, lock)
    cache.get("key", LIKE, made)
    assert held == ["key", "free"]
    cache.get("key", LIKE, made)
    assert held == ["key", "free"]


def test_what_another_found_out_while_we_waited_is_read(tmp_path):
    ours, theirs = Pass(), Pass()

    @contextmanager
    def lock(key):
        StatisticsCache(tmp_path).get(key, LIKE, theirs)
        yield

    entry = StatisticsCache(tmp_path, lock).get("key", LIKE, ours)
    assert entry.cached and (ours.runs, theirs.runs) == (0, 1)
    assert_same(entry, theirs)


def test_a_pass_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise fp.FisherpruneError("no data")

    with pytest.raises(fp.FisherpruneError, match="no data"):
        StatisticsCache(tmp_path).get("key", LIKE, fail)
    assert list(tmp_path.iterdir()) == []
