import os

import numpy as np
import pytest
import torch
from PIL import Image

from fisherprune import data
from fisherprune.data import folder
from fisherprune.errors import FisherpruneError


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(height, width, *channels):
    return np.random.default_rng(0).integers(
        0, 256, (height, width, *channels), np.uint8
    )


@pytest.fixture
def tree(tmp_path):
    """Two classes; PNG, JPEG, grey, palette and odd sizes, and a hidden file."""
    root = tmp_path / "images"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            Image.fromarray(noise(32, 32, 3)).save(root / part / name / "a.png")
            Image.fromarray(noise(50, 37, 3)).save(root / part / name / "b.jpg")
            Image.fromarray(noise(9, 64)).save(root / part / name / "grey.png")
    palette = Image.fromarray(noise(20, 20, 3)).convert("P")
    palette.save(root / "train" / "cat" / "palette.gif")
    (root / "train" / "dog" / ".DS_Store").write_bytes(b"no image")
    return root


def load(root, size=32):
    return data.load("folder", root, image_size=size, quiet=True)


def test_images_of_all_kinds(tree):
    train, test = load(tree)
    assert train.images.shape == (7, 3, 32, 32) and test.images.shape == (6, 3, 32, 32)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    pixels = torch.from_numpy(noise(32, 32, 3)).permute(2, 0, 1)
    assert torch.equal(train.images[0], pixels)
    assert torch.equal(train.images[2, 0], train.images[2, 2])  # grey
    assert train.mean == test.mean and len(train.mean) == 3


def test_names_that_are_not_utf_8(tree):
    odd = os.fsdecode(b"\xff")
    (tree / "train" / "cat" / "a.png").rename(tree / "train" / "cat" / f"{odd}.png")
    place = tree.rename(tree.parent / odd)
    assert len(load(place)[0]) == len(load(place)[0]) == 7


def test_resizing_is_pillows(tree):
    train, _ = load(tree, 16)
    expected = Image.fromarray(noise(32, 32, 3)).resize((16, 16), Image.BILINEAR)
    assert np.array_equal(train.images[0].permute(1, 2, 0), np.asarray(expected))
    assert train.augmentation.padding == 2


def test_turned_photos_are_put_upright(tree):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned a quarter
    path = tree / "train" / "cat" / "a.png"
    Image.fromarray(noise(32, 32, 3)).save(path, exif=exif)
    train, _ = load(tree)
    turned = np.rot90(noise(32, 32, 3), -1)
    assert np.array_equal(train.images[0].permute(1, 2, 0), turned)


def test_images_are_decoded_once(tree, monkeypatch):
    first, _ = load(tree)
    monkeypatch.setattr(folder, "read_image", None)  # would fail
    again, _ = load(tree)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


@pytest.mark.parametrize("change", ["content", "new file", "renamed", "damaged cache"])
def test_the_cache_is_left_when_the_files_change(tree, change):
    before, _ = load(tree)
    path = tree / "train" / "cat" / "a.png"
    if change == "content":
        Image.fromarray(255 - noise(32, 32, 3)).save(path)
        os.utime(path, ns=(0, 1))
    elif change == "new file":
        Image.fromarray(noise(4, 4, 3)).save(path.with_name("0.png"))
    elif change == "renamed":
        path.rename(path.with_name("z.png"))
    else:
        cache = folder.cache_file(tree, 32)
        cache.write_bytes(cache.read_bytes()[:1000])
    after, _ = load(tree)
    assert torch.equal(after.images, before.images) == (change == "damaged cache")
    assert len(list(folder.cache_file(tree, 32).parent.iterdir())) == 1


def test_an_interrupted_reading_leaves_no_cache(tree, cache_dir):
    (tree / "test" / "dog" / "b.jpg").write_bytes(b"\xff\xd8 not much of a JPEG")
    with pytest.raises(FisherpruneError, match="dog/b.jpg is not a readable image"):
        load(tree)
    assert not cache_dir.exists()


def test_a_cache_that_cannot_be_written_is_said_and_lived_without(
    tree, monkeypatch, capsys, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FISHERPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load(tree)[0]) == 7
    assert "warning: the decoded images are not kept" in capsys.readouterr().err


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sixteen_bit(path):
    Image.fromarray(noise(8, 8).astype(np.uint16) * 200).save(path)


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("a.png", truncate, "train/cat/a.png is not a readable image"),
        ("b.jpg", truncate, "train/cat/b.jpg is not a readable image"),
        ("notes.txt", lambda p: p.write_text("x"), "cat/notes.txt is not a readable"),
        ("deep", lambda p: p.mkdir(), "train/cat/deep must be an image file"),
        ("wide.png", sixteen_bit, "wide.png must have 8 bits a channel, got Pillow"),
    ],
)
def test_files_that_are_no_images(tree, name, spoil, message):
    spoil(tree / "train" / "cat" / name)
    with pytest.raises(FisherpruneError, match=message):
        load(tree)


def test_folders_that_are_missing_or_empty(tree, tmp_path):
    with pytest.raises(FisherpruneError, match="nowhere/train must be a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "test").mkdir()
    with pytest.raises(FisherpruneError, match="bare/train must hold class folders"):
        load(tmp_path / "bare")
    (tree / "train" / "eel").mkdir()
    with pytest.raises(FisherpruneError, match="class folder .*test/eel is missing"):
        load(tree)
    (tree / "test" / "eel").mkdir()
    with pytest.raises(FisherpruneError, match="no images in .*train/eel"):
        load(tree)
    (tree / "train" / "eel").rmdir()
    with pytest.raises(FisherpruneError, match="class folder .*train/eel is missing"):
        load(tree)
