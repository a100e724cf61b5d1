"""What a reader needs beside a number: versions, commit, device."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fisherprune.runs.device import device_name


def environment(device: torch.device) -> dict[str, object]:
    """Return what a reader needs beside a number: versions, commit, device."""
    try:
        package = version("fisherprune")
    except PackageNotFoundError:  # run from a source folder
        package = None
    return {
        "fisherprune": package,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _commit() -> str | None:
    """Return the commit of the source folder the package runs from, if it is one."""
    source = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != source:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
