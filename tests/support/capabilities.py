"""Tests run again in processes that use one set of vector instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fisherprune.ops import kernels

HERE = Path(__file__).parent
CAPABILITIES = ["portable", "avx2", "avx512"]


def run_with(capability: str, file: str, calls: str) -> None:
    """Call what a file of tests defines; skip what this process has not."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(kernels.cpu_capability()):
        pytest.skip(f"this process has no {capability}")
    path = Path(file)
    script = (
        "from fisherprune.ops import kernels; print(kernels.cpu_capability())\n"
        f"from {path.stem} import *\n{calls}"
    )
    places = [HERE.parents[1], HERE, path.parent]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "OMP_NUM_THREADS": "1",
        "FISHERPRUNE_CPU_CAPABILITY": capability,
    }
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, capability + "\n"), result.stderr
