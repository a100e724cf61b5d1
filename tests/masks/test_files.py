"""Files of masks."""

import os

import pytest
import torch
from mask_cases import half_masks
from nets import conv_net
from safetensors.torch import save_file

import fisherprune as fp
from fisherprune.masks.masks import Masks


def test_files_of_bools_that_another_tool_wrote(tmp_path):
    masks = half_masks(conv_net())
    save_file(dict(masks), tmp_path / "foreign", metadata={"format": "pt"})
    assert Masks.load(tmp_path / "foreign") == masks
    save_file(dict(masks), tmp_path / "foreign")
    assert Masks.load(tmp_path / "foreign") == masks
    save_file({"a": torch.ones(2) > 0, "b": torch.ones(2)}, tmp_path / "mixed")
    save_file({}, tmp_path / "none")
    for name in ("mixed", "none"):
        with pytest.raises(fp.FisherpruneError, match=f"{name}' holds no masks"):
            Masks.load(tmp_path / name)


@pytest.mark.parametrize("path", [None, 3, b"masks", ["masks"]])
def test_what_is_no_path(path):
    for use in (Masks.load, half_masks(conv_net()).save):
        with pytest.raises(fp.FisherpruneError, match="path must be a path, got"):
            use(path)


def test_files_round_trip(tmp_path):
    masks = half_masks(conv_net())
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert list(loaded) == list(masks)
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_files_keep_the_order_and_repeat(tmp_path):
    masks = Masks({f"layer{i}": torch.rand(3) < 0.5 for i in torch.randperm(12)})
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert list(loaded) == list(masks)
    first = (tmp_path / "masks.safetensors").read_bytes()
    for _ in range(8):
        loaded.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == first


def test_files_without_an_order_load(tmp_path):
    masks = half_masks(conv_net())
    save_file(dict(masks), tmp_path / "old", metadata={"format": "fisherprune-masks-1"})
    loaded = Masks.load(tmp_path / "old")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)


def test_masks_that_share_memory_are_saved(tmp_path):
    mask = torch.rand(4, 6) < 0.5
    masks = Masks({"a": mask, "b": mask, "c": mask.t(), "d": mask[:1].expand(3, 6)})
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(loaded[n], masks[n]) for n in masks)


def test_bad_files_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    half_masks(conv_net()).save(good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-9])
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(os.urandom(200))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    odd = tmp_path / "odd.safetensors"
    save_file(
        {"a": torch.ones(2) > 0}, odd, metadata={"fisherprune-masks-1": '["a", "b"]'}
    )
    with pytest.raises(fp.FisherpruneError, match="absent.* does not exist"):
        Masks.load(tmp_path / "absent")
    for path in (cut, noise, odd):
        with pytest.raises(fp.FisherpruneError, match=f"{path.name}.* can't be read"):
            Masks.load(path)
    with pytest.raises(fp.FisherpruneError, match="foreign.* holds no masks"):
        Masks.load(foreign)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        half_masks(conv_net()).save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]
