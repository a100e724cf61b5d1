import hashlib
import io
import os
import pickle
import socket
import tarfile
import threading
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from fisherprune import data
from fisherprune.data import download
from fisherprune.errors import FisherpruneError

datasets = pytest.importorskip("torchvision.datasets")
PER_FILE = 12


def batch(seed, labels):
    pixels = np.random.default_rng(seed).integers(0, 256, (PER_FILE, 3072), np.uint8)
    return {"data": pixels, labels: [i % 10 for i in range(PER_FILE)]}


FILES = {
    "cifar10": {
        **{f"data_batch_{i}": batch(i, "labels") for i in range(1, 6)},
        "test_batch": batch(6, "labels"),
        "batches.meta": {"label_names": list("abcdefghij")},
    },
    "cifar100": {
        "train": batch(1, "fine_labels"),
        "test": batch(2, "fine_labels"),
        "meta": {"fine_label_names": [f"{i}" for i in range(100)]},
    },
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Serve small archives of the same form, with their own checksums."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, source in (
        ("cifar10", datasets.CIFAR10),
        ("cifar100", datasets.CIFAR100),
    ):
        packed = {key: pickle.dumps(value) for key, value in FILES[name].items()}
        with tarfile.open(folder / source.filename, "w:gz") as archive:
            for key, content in packed.items():
                info = tarfile.TarInfo(f"{source.base_folder}/{key}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        md5 = {key: hashlib.md5(content).hexdigest() for key, content in packed.items()}
        whole = hashlib.md5((folder / source.filename).read_bytes()).hexdigest()
        train = [[k, md5[k]] for k in md5 if k.startswith(("data", "train"))]
        test = [[k, md5[k]] for k in md5 if k.startswith("test")]
        meta = next(k for k in md5 if k.endswith("meta"))
        monkeypatch.setattr(source, "tgz_md5", whole)
        monkeypatch.setattr(source, "train_list", train)
        monkeypatch.setattr(source, "test_list", test)
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5[meta]})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def nobody(monkeypatch):
    """Return an address that refuses connections."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


@pytest.mark.parametrize("name, count", [("cifar10", 60), ("cifar100", 12)])
def test_download_from_a_mirror_and_reading_without_it(
    mirror, nobody, tmp_path, name, count
):
    folder, url = mirror
    train, test = data.load(name, tmp_path / "data", mirror=url)
    assert train.images.shape == (count, 3, 32, 32) and len(test) == PER_FILE
    first = "data_batch_1" if name == "cifar10" else "train"
    pixels = torch.from_numpy(FILES[name][first]["data"]).view(-1, 3, 32, 32)
    assert torch.equal(train.images[:PER_FILE], pixels)
    assert train.labels[:PER_FILE].tolist() == [i % 10 for i in range(PER_FILE)]
    assert len(train.classes) == (10 if name == "cifar10" else 100)
    assert (train.augmentation.padding, train.augmentation.flip) == (4, True)
    again, _ = data.load(name, tmp_path / "data", mirror=f"{nobody}gone")
    assert torch.equal(train.images, again.images)
    small, _ = data.load(name, tmp_path / "data", image_size=16)
    assert small.images.shape == (count, 3, 16, 16)


def test_an_archive_put_there_by_hand_is_enough(mirror, nobody, tmp_path):
    folder, _ = mirror
    (tmp_path / "data").mkdir()
    archive = folder / datasets.CIFAR10.filename
    archive.rename(tmp_path / "data" / archive.name)
    train, _ = data.load("cifar10", tmp_path / "data", mirror=nobody)
    assert len(train) == 60


@pytest.fixture
def broken():
    """Serve an answer that is no HTTP, or ends too soon."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(content):
            def serve():
                with suppress(OSError):  # closed at the end
                    while True:
                        with server.accept()[0] as connection:
                            connection.recv(9999)
                            connection.sendall(content)

            threading.Thread(target=serve, daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield answer


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"no HTTP\r\n\r\n", "failed: no HTTP; put"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
            r"failed: IncompleteRead\(.*\); put",
        ),
    ],
)
def test_a_server_that_breaks_off(content, reason, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(FisherpruneError, match=reason) as caught:
        data.load("cifar10", tmp_path / "data", mirror=broken(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url, reason",
    [
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://127.0.0.1:port", "nonnumeric port: 'port'"),
        ("http://127.0.0.1:9/a b", "URL can't contain control characters"),
    ],
)
def test_an_address_that_is_none(url, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(FisherpruneError, match=f"the download of .* failed: {reason}"):
        data.load("cifar10", tmp_path / "data", mirror=url)


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise HTTPException

    monkeypatch.setattr(datasets.CIFAR10, "__init__", fail)
    with pytest.raises(FisherpruneError, match="failed: HTTPException; put"):
        data.load("cifar10", tmp_path)


def test_a_server_that_is_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(FisherpruneError, match="failed: .*timed out.*; put"):
            data.load("cifar10", tmp_path / "data", mirror=url)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    "name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1"]
)
def test_a_pipe_is_no_data(nobody, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(FisherpruneError, match=f"data_dir: .*{name} must be a file"):
        data.load("cifar10", tmp_path, mirror=nobody)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_is_no_folder_of_data(below, nobody, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / below
    message = f"^data_dir must be a folder, got {place}: {tmp_path / 'file'} is none$"
    with pytest.raises(FisherpruneError, match=message):
        data.load("cifar10", place, mirror=nobody)


@pytest.mark.parametrize("trouble", ["corrupted", "absent", "no server"])
def test_a_failed_download_says_what_to_do(mirror, nobody, tmp_path, trouble):
    folder, url = mirror
    archive = folder / datasets.CIFAR10.filename
    if trouble == "corrupted":
        archive.write_bytes(archive.read_bytes()[:-9] + b"corrupted")
    elif trouble == "absent":
        archive.unlink()
    else:
        url = nobody
    with pytest.raises(FisherpruneError) as caught:
        data.load("cifar10", tmp_path / "data", mirror=url)
    message = str(caught.value)
    reason = {"corrupted": "corrupt", "absent": "404", "no server": "refused"}[trouble]
    assert reason in message
    for part in (
        str(tmp_path / "data" / "cifar-10-batches-py"),
        f"{url}cifar-10-python.tar.gz",
        datasets.CIFAR10.tgz_md5,
        "--data-mirror",
        "--dataset digits",
    ):
        assert part in message
