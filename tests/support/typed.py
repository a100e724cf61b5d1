"""What a strict type checker says of code that uses the package."""

import subprocess
import sys

from filelock import FileLock
from page_blocks import ROOT

OPTIONS = ["--strict", "--follow-imports=silent", "--config-file="]
OPTIONS += ["--allow-untyped-calls", "--python-version=3.10"]
"""Some of torch's functions have no types."""


def checked(*paths):
    """Return the checker's exit status and what it prints.

    It reads all of torch at its first call; the next ones find what it made of that.
    """
    cache = ROOT / "build" / "typed"
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mypy", *OPTIONS, f"--cache-dir={cache}", *paths]
    with FileLock(cache / "lock"):  # several processes run tests
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
