"""What datasets that are downloaded share: patience, and what is in the way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from fisherprune.errors import FisherpruneError

PATIENCE = 60.0
"""Seconds a server may be silent."""
FAILURES = (OSError, RuntimeError, HTTPException, ValueError)
"""What torchvision raises where a download fails or the data are not whole."""


@contextmanager
def patience() -> Iterator[None]:
    """Give up on servers that are silent: torchvision waits for them for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def check_files(*paths: Path) -> None:
    """Raise for what would be read and is no file, a pipe that nobody writes to say."""
    for path in paths:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise FisherpruneError(
                f"data_dir: {path} must be a file, got something else"
            )


def check_folder(data_dir: Path) -> None:
    """Raise where ``data_dir`` is a file, or would be in one."""
    for path in (data_dir, *data_dir.parents):
        if os.path.isdir(path):
            return
        if os.path.exists(path):
            raise FisherpruneError(
                f"data_dir must be a folder, got {data_dir}: {path} is none"
            )


def no_data(
    name: str, folder: Path, url: str, archive: Path, md5: str, error: Exception
) -> FisherpruneError:
    """Return the error of a dataset that is not there and can't be downloaded.

    Args:
        name: of the dataset.
        folder: where the unpacked data would be.
        url: of the archive.
        archive: where the archive can be put by hand.
        md5: of the archive.
        error: what went wrong.
    """
    reason = " ".join(f"{error}".split()) or type(error).__name__
    return FisherpruneError(
        f"{name}: no complete data in {folder}, and the download of {url} failed: "
        f"{reason}; put {archive.name} (md5 {md5}) into {archive.parent} or name "
        "another address with --data-mirror; --dataset digits needs neither files nor "
        "a network"
    )
