"""TinyImageNet, read from small trees and archives of its form."""

import hashlib
import os
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from fisherprune import data
from fisherprune.data import tinyimagenet
from fisherprune.errors import FisherpruneError

WNIDS = ["n09", "n01", "n05"]
"""Not in order, as in the authors' list."""


@pytest.fixture(autouse=True)
def _cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERPRUNE_CACHE", str(tmp_path / "cache"))


def save(path, colour, size=64):
    Image.new("RGB", (size, size), (colour, 0, 0)).save(path, quality=95)


@pytest.fixture
def root(tmp_path):
    """Two training images of each class, four for validation, flat colours."""
    root = tmp_path / "data" / "tiny-imagenet-200"
    for i, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        for j in range(2):
            save(images / f"{wnid}_{j}.JPEG", 80 * i + 20 * j)
        boxes = [f"{wnid}_{j}.JPEG\t0\t0\t63\t63\n" for j in range(2)]
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))
    (root / "val" / "images").mkdir(parents=True)
    chosen = ["n05", "n09", "n01", "n09"]
    for j in range(len(chosen)):
        save(root / "val" / "images" / f"val_{j}.JPEG", 60 * j)
    lines = [f"val_{j}.JPEG\t{w}\t0\t32\t44\t62\n" for j, w in enumerate(chosen)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "test" / "images").mkdir(parents=True)
    save(root / "test" / "images" / "test_0.JPEG", 255)
    return root


def load(root, **options):
    return data.load("tinyimagenet", root.parent, quiet=True, **options)


def reds(part):
    return part.images[:, 0].flatten(1).double().mean(1).round().int().tolist()


def test_training_images_and_the_validation_images_for_tests(root):
    train, test = load(root)
    assert train.images.shape == (6, 3, 64, 64) and test.images.shape == (4, 3, 64, 64)
    assert train.classes == test.classes == ("n01", "n05", "n09")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.allclose(reds(train), [80, 100, 160, 180, 0, 20], atol=2)
    assert test.labels.tolist() == [1, 2, 0, 2]
    assert np.allclose(reds(test), [0, 60, 120, 180], atol=2)
    assert (train.augmentation.padding, train.augmentation.flip) == (4, True)
    assert train.mean == test.mean == (0.480, 0.448, 0.397)
    small, _ = load(root, image_size=32)
    assert small.images.shape == (6, 3, 32, 32) and small.augmentation.padding == 2


def test_hidden_files_are_passed_over_and_images_decoded_once(root):
    hidden = root / "train" / "n01" / "images" / "._n01_0.JPEG"
    hidden.write_bytes(b"no image")
    first, _ = load(root)
    for path in root.rglob("n*.JPEG"):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(load(root)[0].images, first.images)


def keep_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_text("")


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "place, spoil, message",
    [
        ("wnids.txt", os.remove, "{path}: can't be read: No such file"),
        ("wnids.txt", empty, "{path} must hold lines, got an empty file"),
        ("wnids.txt", to_pipe, "data_dir: {path} must be a file, got something else"),
        (
            "wnids.txt",
            lambda p: p.write_text("n01\nn01"),
            r"{path} must hold different names of classes, at least 2, got \['n01', 'n",
        ),
        ("wnids.txt", lambda p: p.write_bytes(b"\xff\n"), "{path}: must be a text fil"),
        ("train/n05", shutil.rmtree, "{path}/n05_boxes.txt: can't be read: No such"),
        ("train/n05/images", shutil.rmtree, "tinyimagenet: {path} must be a folder"),
        ("train/n05/n05_boxes.txt", os.remove, "{path}: can't be read: No such file"),
        (
            "train/n05/images/n05_1.JPEG",
            os.remove,
            "tinyimagenet: {path} must be an image file, as .*/n05_boxes.txt says",
        ),
        ("train/n05/images/n05_1.JPEG", to_pipe, "tinyimagenet: {path} must be an ima"),
        ("train/n05/images/n05_1.JPEG", keep_half, "data_dir: {path} is not a readabl"),
        (
            "train/n05/images/n05_9.JPEG",
            lambda p: save(p, 0),
            "tinyimagenet: .*/n05_boxes.txt must name every image, got {path} too",
        ),
        ("val/val_annotations.txt", os.remove, "{path}: can't be read: No such file"),
        (
            "val/val_annotations.txt",
            lambda p: p.write_text("val_0.JPEG\tn77\t0\t0\t9\t9"),
            r"{path}: each line must hold an image and its class of wnids.txt, got 'va",
        ),
        (
            "val/val_annotations.txt",
            lambda p: p.write_text("val_0.JPEG"),
            "{path}: each line must hold an image and its class .*, got 'val_0.JPEG'",
        ),
        (
            "val/images/val_3.JPEG",
            os.remove,
            "tinyimagenet: {path} must be an image file, as .*/val_annotations.txt sa",
        ),
        ("val/images/val_4.JPEG", lambda p: save(p, 0), ".* every image, got {path} t"),
    ],
)
def test_what_is_missing_or_damaged_is_named(root, place, spoil, message):
    spoil(root / place)
    with pytest.raises(FisherpruneError, match=message.format(path=root / place)):
        load(root)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(root, tmp_path, monkeypatch):
    """Serve the tree as an archive of its own checksum; the tree itself is gone."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    archive = tmp_path / "mirror" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(root.rglob("*")):
            packed.write(path, path.relative_to(root.parent))
    shutil.rmtree(root)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(tinyimagenet, "MD5", md5)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(archive.parent))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield archive, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_download_from_a_mirror_and_reading_without_it(mirror, root):
    archive, url = mirror
    train, test = load(root, mirror=url)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(test) == 4
    archive.unlink()
    again, _ = load(root, mirror=url)
    assert torch.equal(again.images, train.images)
    names = {path.name for path in root.parent.iterdir()}
    assert names == {"tiny-imagenet-200", "tiny-imagenet-200.zip"}


def test_an_archive_put_there_by_hand_is_enough(mirror, root):
    archive, url = mirror
    archive.rename(root.parent / archive.name)
    assert len(load(root, mirror=url)[0]) == 6


@pytest.mark.parametrize("trouble", ["corrupted", "absent"])
def test_a_failed_download_says_what_to_do(mirror, root, trouble):
    archive, url = mirror
    if trouble == "absent":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes()[:-9] + b"corrupted")
    with pytest.raises(FisherpruneError) as caught:
        load(root, mirror=url)
    reason = {"corrupted": "corrupt", "absent": "404"}[trouble]
    for part in (reason, str(root), f"{url}{archive.name}", tinyimagenet.MD5, "mirror"):
        assert part in str(caught.value)
    assert not root.exists()


def test_an_unpacking_that_fails_leaves_nothing(mirror, root, monkeypatch):
    _, url = mirror
    extract = zipfile.ZipFile.extract

    def fail(self, member, path):
        if member.filename.endswith("wnids.txt"):
            raise OSError(28, "No space left on device", member.filename)
        return extract(self, member, path)

    monkeypatch.setattr(zipfile.ZipFile, "extract", fail)
    with pytest.raises(OSError, match="No space left on device"):
        load(root, mirror=url)
    names = [path.name for path in root.parent.iterdir()]
    assert names == ["tiny-imagenet-200.zip"]
    monkeypatch.undo()


def test_a_file_is_no_folder_of_data(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(FisherpruneError, match="data_dir must be a folder, got"):
        data.load("tinyimagenet", tmp_path / "data", quiet=True)
