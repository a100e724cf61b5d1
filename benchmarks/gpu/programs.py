"""Programs that a step runs: they are found, started, and their lines passed on."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.measure import NotHere
from benchmarks.record import ROOT


def find_program(name: str) -> str:
    """Return a program: on the PATH, in a CUDA toolkit, or beside Python packages.

    Raises:
        NotHere: where it is not installed.
    """
    if found := shutil.which(name):
        return found
    places = ["/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer"]
    places += [str(Path(p, "nvidia", "*", "bin")) for p in sys.path if p]
    for place in places:
        for path in sorted(glob.glob(f"{place}/{name}"), reverse=True):
            if os.access(path, os.X_OK):
                return path
    raise NotHere(f"{name} is not installed")


def start(command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command in the root folder, with more environment variables."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield each line as it comes, and print it: a step that is cut leaves them."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        yield line
    process.wait()
