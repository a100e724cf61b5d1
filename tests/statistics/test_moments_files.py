"""Files of gradient moments."""

import json
import re

import pytest
import torch
from checks import assert_moments
from nets import batches, conv_net, data
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from truth import moments as true_moments

import fisherprune as fp

SMALL = 500  # bytes of a file: more than one of the network's tensors are larger


def moments(scale=1.0, **options):
    """Return a model, its data and its moments."""
    model, (x, y) = conv_net(), data((3, 9, 9))
    options = {"parameters": dict(model.named_parameters())} | options

    def loss(out, labels):
        return nn.functional.cross_entropy(out, labels, reduction="sum") * scale

    return model, x, y, fp.gradient_moments(model, batches(x, y, 4), loss, **options)


def assert_same(found, expected):
    for part in ("sum", "sum_sq"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for fact in ("samples", "groups", "group_size", "paths", "exponent", "labels"):
        assert getattr(found, fact) == getattr(expected, fact)


@pytest.mark.parametrize("max_shard_bytes", [10**9, SMALL, 1])
@pytest.mark.filterwarnings("ignore:gradient_moments")
@pytest.mark.parametrize("scale, group_size", [(1.0, 1), (2.0**-80, 3)])
def test_what_is_loaded_is_what_was_saved(tmp_path, max_shard_bytes, scale, group_size):
    *_, expected = moments(scale, group_size=group_size)
    assert (expected.exponent == 0) == (scale == 1)
    path = tmp_path / "a.safetensors"
    expected.save(path, max_shard_bytes=max_shard_bytes)
    assert path.exists() == (max_shard_bytes == 10**9)
    assert_same(fp.GradientMoments.load(path), expected)
    assert_same(fp.GradientMoments.load(str(path)), expected)


def test_sampled_labels_tensors_of_any_strides_and_of_no_dimension(tmp_path):
    sums = {"a/b": torch.randn(4, 6)[:, ::2], "scale": torch.randn(()).abs()}
    squares = {name: s.square() for name, s in sums.items()}
    ways = {"a/b": ("linear", "vmap"), "scale": ()}
    expected = fp.GradientMoments(sums, squares, 7, 4, 2, ways, -3, "sampled")
    expected.save(tmp_path / "a", max_shard_bytes=20)
    assert_same(fp.GradientMoments.load(tmp_path / "a"), expected)


@pytest.mark.parametrize("max_shard_bytes", [10**9, SMALL])
def test_loaded_moments_add_up(tmp_path, max_shard_bytes):
    model, (x, y) = conv_net(), data((3, 9, 9))
    for i, part in enumerate((slice(0, 6), slice(6, 13))):
        found = fp.gradient_moments(model, [(x[part], y[part])])
        path = tmp_path / f"{i}.safetensors"
        found.save(path, provenance={"part": i}, max_shard_bytes=max_shard_bytes)
    one, two = (fp.GradientMoments.load(tmp_path / f"{i}.safetensors") for i in (0, 1))
    both = one + two
    assert both.samples == 13
    assert both.provenance == ({"part": 0}, {"part": 1})
    assert_moments(both, true_moments(model, x, y, fp.prunable_parameters(model)))


def test_provenance_is_kept_and_grows(tmp_path):
    *_, found = moments()
    said = {"model": "resnet20", "data": {"files": 3, "hash": "ab"}, "loss": None}
    found.save(tmp_path / "a", provenance=said)
    loaded = fp.GradientMoments.load(tmp_path / "a")
    assert loaded.provenance == (said,)
    loaded.save(tmp_path / "b", provenance={"by": "me"})
    assert fp.GradientMoments.load(tmp_path / "b").provenance == (said, {"by": "me"})
    loaded.save(tmp_path / "b")
    assert fp.GradientMoments.load(tmp_path / "b").provenance == (said,)


def test_others_can_read_the_tensors_and_the_index(tmp_path):
    *_, found = moments()
    found.save(tmp_path / "a.safetensors")
    one = load_file(tmp_path / "a.safetensors")
    found.save(tmp_path / "b.safetensors", max_shard_bytes=SMALL)
    index = json.loads((tmp_path / "b.safetensors.index.json").read_text())
    several = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            several[name] = shard.get_tensor(name)
    for tensors in (one, several):
        assert len(tensors) == 2 * len(found.sum)
        for name in found.sum:
            assert torch.equal(tensors[f"sum/{name}"], found.sum[name])
            assert torch.equal(tensors[f"sum_sq/{name}"], found.sum_sq[name])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    for file in {*index["weight_map"].values()}:
        held = load_file(tmp_path / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= SMALL
        assert re.fullmatch(r"b\..*-\d{5}-of-\d{5}\.safetensors", file)


def test_saving_again_replaces_every_file(tmp_path):
    path = tmp_path / "a.safetensors"
    for max_shard_bytes in (SMALL, 2 * SMALL, 10**9, SMALL):
        *_, found = moments()
        found.save(path, max_shard_bytes=max_shard_bytes)
        assert_same(fp.GradientMoments.load(path), found)
        files = {file.name for file in tmp_path.iterdir()}
        index = tmp_path / "a.safetensors.index.json"
        held = {path.name}
        if max_shard_bytes < 10**9:
            held = {*json.loads(index.read_text())["weight_map"].values(), index.name}
        assert files == held


def test_the_same_moments_are_the_same_bytes(tmp_path):
    *_, found = moments()
    for name in "ab":
        found.save(tmp_path / name, provenance={"x": 1, "y": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [10**9, SMALL])
def test_permissions_are_those_of_other_new_files(tmp_path, max_shard_bytes):
    *_, found = moments()
    (tmp_path / "other").touch()
    found.save(tmp_path / "a", max_shard_bytes=max_shard_bytes)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def shards_of(folder):
    return sorted(folder.glob("*-of-*.safetensors"))


def refused(path, match):
    with pytest.raises(fp.FisherpruneError, match=match) as error:
        fp.GradientMoments.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("max_shard_bytes", [10**9, SMALL])
def test_every_changed_byte_is_found(tmp_path, max_shard_bytes):
    *_, found = moments()
    path = tmp_path / "a.safetensors"
    found.save(path, provenance={"data": "A"}, max_shard_bytes=max_shard_bytes)
    file = ([path] if path.exists() else shards_of(tmp_path))[0]
    good = file.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, 9), *torch.randint(8, start, (25,)).tolist(), start]
    for place in [*places, *torch.randint(start, len(good), (10,)).tolist()]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(torch.randint(7, ()))
        file.write_bytes(bad)
        try:  # what is filling, say, may change
            assert_same(fp.GradientMoments.load(path), found)
        except fp.FisherpruneError:
            continue
        assert place < start
    for count in (0, 5, start - 3, len(good) - 1):
        file.write_bytes(good[:count])
        refused(path, "moments file '.*' can't be read: ")


def test_a_changed_value_and_a_changed_count_are_found(tmp_path):
    *_, found = moments()
    path = tmp_path / "a.safetensors"
    found.save(path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(path, "a.safetensors' can't be read: its checksum is wrong")
    path.write_bytes(good.replace(b'samples\\": 13', b'samples\\": 14'))
    refused(path, "can't be read: the checksum of its metadata is wrong")


def test_shards_that_are_missing_mixed_or_alone(tmp_path):
    *_, found = moments()
    *_, other = moments()
    for folder, each in (("a", found), ("b", other)):
        (tmp_path / folder).mkdir()
        each.save(tmp_path / folder / "m.safetensors", max_shard_bytes=SMALL)
    path = tmp_path / "a" / "m.safetensors"
    ours, theirs = shards_of(tmp_path / "a"), shards_of(tmp_path / "b")
    refused(ours[0], "can't be read: it holds a part of the moments: load the index")
    good = ours[1].read_bytes()
    ours[1].write_bytes(theirs[1].read_bytes())
    refused(path, "can't be read: it is of other moments than the index")
    ours[1].write_bytes(ours[0].read_bytes())
    refused(path, "can't be read: its checksum is wrong")
    ours[1].unlink()
    refused(path, "00002-of-.*' can't be read: it is missing, and the index names it")
    ours[1].write_bytes(good)
    index = tmp_path / "a" / "m.safetensors.index.json"
    assert_same(fp.GradientMoments.load(index), found)
    content = json.loads(index.read_text())
    whole = dict(content["weight_map"])
    for places in ([], {}, {"x": 3}, {"x": "../m"}):
        index.write_text(json.dumps(content | {"weight_map": places}))
        refused(path, "its weight_map must name the file of each tensor")
    part = {n: file for n, file in whole.items() if file != ours[-1].name}
    index.write_text(json.dumps(content | {"weight_map": part}))
    refused(path, "it holds a part of the moments")
    index.write_text("{")
    refused(path, "index.json: is no JSON")


def test_files_of_something_else(tmp_path):
    path = tmp_path / "a.safetensors"
    refused(path, "moments file '.*a.safetensors' does not exist")
    save_file({"sum/w": torch.ones(2)}, path)
    refused(path, "a.safetensors' holds no gradient moments")
    fp.Masks({"w": torch.ones(2) > 0}).save(path)
    refused(path, "a.safetensors' holds no gradient moments")
    save_file({"w": torch.ones(2)}, path, {"fisherprune-moments-999": "{}"})
    refused(path, "must be of fisherprune-moments-1, got fisherprune-moments-999")
    save_file({"w": torch.ones(2)}, path, {"fisherprune-moments-1": "[]"})
    refused(path, "the checksum of its metadata is wrong")
    path.unlink()
    index = tmp_path / "a.safetensors.index.json"
    index.write_text('{"metadata": {"total_size": 8}, "weight_map": {"w": "x"}}')
    refused(path, "index.json' holds no gradient moments")
    *_, found = moments()
    with pytest.raises(fp.FisherpruneError, match="index.json' holds no gradient mom"):
        found.save(path)  # it would take the place of a checkpoint
    assert index.exists() and not path.exists()


def test_arguments_that_no_file_can_have(tmp_path):
    *_, found = moments()
    for options, match in [
        ({"provenance": "A"}, "save: provenance must be a dict of what JSON .*got 'A'"),
        ({"provenance": {"a": torch.ones(1)}}, "provenance must .*Tensor is not JSON"),
        ({"provenance": {"a": float("nan")}}, "provenance must .*JSON compliant"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be an integer of at least 1"),
        ({"max_shard_bytes": 1e9}, "max_shard_bytes must be an integer of at least 1"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=match):
            found.save(tmp_path / "a", **options)
    with pytest.raises(fp.FisherpruneError, match="save: path must be a path, got 3"):
        found.save(3)
    refused(3, "load: path must be a path, got 3")
    refused(tmp_path, "load: path must be the path of a file, got the folder ")
    for path, match in [
        (tmp_path, "save: path must be the path of a file, got the folder "),
        (tmp_path / "a.index.json", "save: path must be one without .index.json"),
    ]:
        with pytest.raises(fp.FisherpruneError, match=match):
            found.save(path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="nowhere"):
        found.save(tmp_path / "nowhere" / "a")
