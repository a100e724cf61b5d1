import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fisherprune import data
from fisherprune.data.decoded import cache_file
from fisherprune.data.images import read_image
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


def with_exif(entries, image_format="JPEG"):
    """Return a small photo with the given EXIF entries: (tag, type, count, value)."""
    file = io.BytesIO()
    Image.fromarray(noise(24, 20, 3)).save(file, image_format)
    photo = file.getvalue()
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries))
    exif += b"".join(struct.pack("<HHLL", *entry) for entry in entries) + bytes(4)
    length = struct.pack(">H", len(exif) + 2)
    return photo[:2] + b"\xff\xe1" + length + exif + photo[2:]


@pytest.mark.parametrize(
    "entries, quarter_turns",
    [
        ([(0x112, 3, 1, 6), (0x128, 1, 1, 2)], -1),  # a byte where a short belongs
        ([(0x112, 3, 1, 8), (0x8769, 4, 1, 2**31)], 1),  # a table beyond the end
        ([(0x112, 3, 1, 6), (0x11A, 5, 2**31, 2**31)], -1),  # more than there is
        ([(0x112, 3, 1, 77)], 0),
        ([(0x112, 2, 4, 0x36363636)], 0),  # text where a number belongs
        ([(0x10F, 99, 1, 1)], 0),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_photos_with_odd_exif_are_read(tree, entries, quarter_turns):
    path = tree / "train" / "cat" / "b.jpg"
    path.write_bytes(with_exif(entries))
    plain = np.asarray(Image.open(path).convert("RGB"))
    upright = Image.fromarray(np.rot90(plain, quarter_turns))
    found = read_image(path, 32)
    assert np.array_equal(found, upright.resize((32, 32), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_put_upright_as_pillow_does(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    path.write_bytes(with_exif([(0x112, 3, 1, orientation)]))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).resize((24, 24), Image.BILINEAR)
    assert np.array_equal(read_image(path, 24), upright)


@pytest.mark.parametrize(
    "error", [struct.error("odd"), TypeError(), MemoryError(), AttributeError("a\nb")]
)
def test_whatever_the_decoder_raises_names_the_file(tree, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(
        FisherpruneError, match=r"cat/a\.png is not a readable image: \w"
    ) as caught:
        load(tree)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "DDS", "JPEG2000", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_named(tmp_path, kind):
    file = io.BytesIO()
    try:
        Image.fromarray(noise(24, 20, 3)).save(file, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    whole, path = file.getvalue(), tmp_path / "image"
    for _ in range(40):
        damaged = bytearray(whole)
        for place in np.random.randint(0, min(len(whole), 300), 4):
            damaged[place] = np.random.randint(256)
        path.write_bytes(damaged)
        try:
            assert read_image(path, 8).shape == (8, 8, 3)
        except FisherpruneError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_images_are_decoded_once(tree):
    first, _ = load(tree)
    for path in (path for path in tree.rglob("*.*") if path.is_file()):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))  # no image
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again, _ = load(tree)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


@pytest.mark.parametrize("change", ["content", "new file", "renamed"])
def test_the_cache_is_left_when_the_files_change(tree, change):
    before, _ = load(tree)
    path = tree / "train" / "cat" / "a.png"
    if change == "content":
        Image.fromarray(255 - noise(32, 32, 3)).save(path)
        os.utime(path, ns=(0, 1))
    elif change == "new file":
        Image.fromarray(noise(4, 4, 3)).save(path.with_name("0.png"))
    else:
        path.rename(path.with_name("z.png"))
    after, _ = load(tree)
    assert not torch.equal(after.images, before.images)
    assert len(list(cache_file(tree, 32).parent.iterdir())) == 1


@pytest.mark.parametrize(
    "damage", ["a byte", "cut", "fewer images", "one channel", "a pipe"]
)
def test_a_damaged_cache_is_not_used(tree, damage):
    before, _ = load(tree)
    cache = cache_file(tree, 32)
    with safe_open(cache, "pt") as file:
        marks = file.metadata()
    tensors = load_file(cache)
    content = bytearray(cache.read_bytes())
    content[-5000] ^= 1
    cache.unlink()
    if damage in ("a byte", "cut"):
        cache.write_bytes(content[: 1000 if damage == "cut" else None])
    elif damage == "a pipe":
        os.mkfifo(cache)
    else:
        few = damage == "fewer images"
        images = tensors["train"][:5] if few else tensors["train"][:, :1]
        tensors["train"] = images.contiguous()
        marks["train"] = f"{zlib.crc32(images.contiguous().numpy())}"
        save_file(tensors, cache, marks)
    after, _ = load(tree)
    assert torch.equal(after.images, before.images)


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


def draw_eps(path):
    Image.new("RGB", (8, 8)).save(path, "EPS")


def chunk(kind, content):
    end = struct.pack(">L", zlib.crc32(kind + content))
    return struct.pack(">L", len(content)) + kind + content + end


def sixteen_bit_colours(kind):
    """Return what writes a black image of 4x4 pixels: Pillow itself writes none."""
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", 4, 4, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4 * (1 + 4 * 6))))
    sizes = ((256, 4), (257, 4), (259, 1), (262, 2), (277, 3), (278, 4), (279, 96))
    tags = [struct.pack("<HHLHH", tag, 3, 1, value, 0) for tag, value in sizes]
    tags.insert(2, struct.pack("<HHLL", 258, 3, 3, 122))  # bits of each channel
    tags.insert(5, struct.pack("<HHLL", 273, 4, 1, 128))  # where the pixels begin
    content = {
        "png": b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""),
        "tif": b"II*\0\x08\0\0\0\x09\0" + b"".join(tags) + bytes(4)
        + struct.pack("<HHH", 16, 16, 16) + bytes(96),
        "ppm": b"P6 4 4 65535\n" + bytes(96),
    }  # fmt: skip
    return lambda path: path.write_bytes(content[kind])


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("loop.png", lambda p: p.symlink_to(p), "cat/loop.png must be an image file"),
        ("pipe.png", os.mkfifo, "train/cat/pipe.png must be an image file"),
        (
            "far.png",
            lambda p: p.symlink_to("/dev/zero"),
            "far.png must be an image fil",
        ),
        ("drawn.png", draw_eps, "cat/drawn.png must be an image of pixels, got EPS"),
        ("deep.png", sixteen_bit_colours("png"), "8 bits .* Pillow mode RGB;16B"),
        ("deep.tif", sixteen_bit_colours("tif"), "8 bits .* Pillow mode RGB;16L"),
        ("deep.ppm", sixteen_bit_colours("ppm"), "8 bits .* Pillow mode RGB;16B"),
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
