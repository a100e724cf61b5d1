"""What must hold on a GPU before its numbers mean anything: build, tests, sanitizers.

Nothing here needs a GPU by itself: commands are put together, run with a time limit,
and what they say is read.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import NotHere
from benchmarks.record import ROOT
from fisherprune.ops import kernels
from fisherprune.ops.sources import source_hash

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = ("tests/ops/test_cuda.py", "tests/test_doctor.py")  # all that use a GPU
NEEDED = ("numpy", "safetensors", "tqdm", "fisherprune.masks", "benchmarks.gpu.rows")
TAIL = 30  # lines of a failed command's output that are kept
FOUND = 9  # the sanitizer's exit status where it found something


# --- commands -------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a command ended; ``status`` is None where it ran out of time."""

    status: int | None
    output: str

    @property
    def ending(self) -> str:
        """Say it in words."""
        return "ran out of time" if self.status is None else f"exit {self.status}"

    @property
    def tail(self) -> list[str]:
        """The last lines of the output."""
        return self.output.splitlines()[-TAIL:]


def run_limited(
    command: Sequence[str], seconds: float, more: dict[str, str] | None = None
) -> Outcome:
    """Run a command in the root folder; end it and its children after ``seconds``."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(more or {})}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:
                _end_group(process)
        output.seek(0)
        return Outcome(status, output.read().decode(errors="replace"))


def _end_group(process: subprocess.Popen) -> None:
    """End the process and its children; a new session has the number of its leader."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- build ----------------------------------------------------------------------------


def covers(archs: str, capability: tuple[int, int]) -> bool | None:
    """Say whether kernels for TORCH_CUDA_ARCH_LIST ``archs`` run on a device.

    None where that hangs on a word other than a version: "Hopper", "native", nothing at
    all, which torch takes for the devices of the machine that builds.

    Machine code runs on its own major version from its minor version on, code of an
    architecture's own features ("9.0a") there alone, PTX wherever it is not newer.
    """
    otherwise: bool | None = False
    for arch in re.split(r"[;\s]+", archs.strip()):
        if not (found := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)):
            otherwise = None
            continue
        built = int(found[1]), int(found[2])
        if built == capability:
            return True
        if not found[3] and built < capability:
            if built[0] == capability[0] or found[4]:
                return True
    return otherwise


def import_faults() -> list[str]:
    """Name what the later steps import and this machine lacks."""
    faults = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            faults.append(f"the steps must be able to import {name}: {error}")
    return faults


def build_facts(capability: tuple[int, int]) -> dict[str, Any]:
    """Return what the loaded kernels were built from and for, and ``faults``."""
    now, wanted = source_hash(ROOT / "csrc"), f"{capability[0]}.{capability[1]}"
    faults = []
    if not kernels.CUDA_VERSION:
        faults.append(f"the loaded kernels are built without CUDA; {kernels.MEND}")
    elif covers(kernels.CUDA_ARCHS, capability) is False:
        faults.append(
            f"the kernels must cover compute capability {wanted}, they are built for "
            f"{kernels.CUDA_ARCHS}; set TORCH_CUDA_ARCH_LIST and {kernels.MEND}"
        )
    if kernels.SOURCE_HASH != now:
        faults.append(
            f"the kernels must be built from csrc/ as it is ({now}), they are from "
            f"{kernels.SOURCE_HASH}; {kernels.MEND}"
        )
    return {
        "cuda": kernels.CUDA_VERSION,
        "archs": kernels.CUDA_ARCHS,
        "compiler": kernels.COMPILER,
        "torch": kernels.TORCH_VERSION,
        "source_hash": kernels.SOURCE_HASH,
        "faults": faults,
    }


# --- tests ----------------------------------------------------------------------------


def pytest_command() -> list[str]:
    """Return the call of pytest: one line per test, so that a cut run can be read."""
    return [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *TESTS]


def pytest_result(outcome: Outcome) -> dict[str, Any]:
    """Count the tests by result; ``ok`` where all ran and none failed."""
    line = re.compile(
        r"::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$", re.MULTILINE
    )
    words = line.findall(outcome.output)
    counts = {word.lower(): n for word, n in Counter(words).items()}
    result = {"counts": counts, "ended": outcome.ending, "ok": outcome.status == 0}
    return result if result["ok"] else {**result, "tail": outcome.tail}


# --- compute-sanitizer ----------------------------------------------------------------


def find_sanitizer() -> str:
    """Return the program: on the PATH, in a toolkit, or beside the Python packages.

    Raises:
        NotHere: where it is not installed.
    """
    if found := shutil.which("compute-sanitizer"):
        return found
    places = ["/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer"]
    places += [str(Path(p, "nvidia", "*", "bin")) for p in sys.path if p]
    for place in places:
        for path in sorted(glob.glob(f"{place}/compute-sanitizer"), reverse=True):
            if os.access(path, os.X_OK):
                return path
    raise NotHere("compute-sanitizer is not installed")


def sanitizer_command(program: str, tool: str) -> list[str]:
    """Return the call that runs the small cases, with our kernels alone under it.

    initcheck watches all kernels: it must see what torch's own ones write.
    """
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    command += ["--print-limit", "20"]
    if tool != "initcheck":
        command += ["--kernel-name", "kns=fisherprune"]
    return [*command, sys.executable, "-m", "benchmarks.gpu.cases"]


def sanitizer_environment() -> dict[str, str]:
    """Every tensor gets an allocation of its own: no access beyond it is missed."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def why_not_sanitized(outcome: Outcome) -> str | None:
    """Say why a run of a tool tells nothing: the device, or the time; None if it does.

    A run that was cut and had found something by then does.
    """
    if "Device not supported" in outcome.output:
        return "compute-sanitizer does not support this device"
    found = re.search(r"^=+ (?!COMPUTE-SANITIZER)\S", outcome.output, re.MULTILINE)
    return outcome.ending if outcome.status is None and not found else None


def sanitizer_result(outcome: Outcome) -> dict[str, Any]:
    """Read the tool's own summary; ``ok`` where it is there and counts nothing."""
    summary = re.search(
        r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?).*", outcome.output
    )
    found = int(summary[1]) if summary else None
    ok = outcome.status == 0 and found == 0
    result = {"found": found, "ended": outcome.ending, "ok": ok}
    return result if ok else {**result, "tail": outcome.tail}
