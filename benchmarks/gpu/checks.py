"""What must hold on a GPU before its numbers mean anything: build, tests, sanitizers.

Each function is a step: it yields what it adds to the record, and leaves by
``sys.exit`` with a message where something is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu.measure import Found, NotHere
from benchmarks.gpu.programs import find_program, lines_of, start
from benchmarks.record import ROOT, environment
from fisherprune.ops import kernels
from fisherprune.ops.sources import source_hash

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS = (  # those that use a GPU, those that take long at the end
    "tests/ops/test_cuda.py",
    "tests/ops/test_cuda_streams.py",
    "tests/ops/test_cuda_wgmma.py",
    "tests/statistics/test_cuda.py",
    "tests/sparse/test_semi_structured.py",
    "tests/test_doctor.py",
    "tests/train/test_cuda.py",
)
FOUND = 9  # the sanitizer's exit status where it found something


# --- build ----------------------------------------------------------------------------


def build(device: str) -> Iterator[Found]:
    """Describe the machine and the kernels; they must fit each other and csrc/."""
    major, minor = capability = torch.cuda.get_device_capability(device)
    place = environment(device) | {
        "driver": driver(),
        "capability": f"{major}.{minor}",
        "memory_gb": round(torch.cuda.mem_get_info(device)[1] / 1e9, 1),
        "source_hash": kernels.SOURCE_HASH,
    }
    facts = {
        "cuda": kernels.CUDA_VERSION,
        "archs": kernels.CUDA_ARCHS,
        "compiler": kernels.COMPILER,
        "torch": kernels.TORCH_VERSION,
    }
    yield {"environment": place, "build": facts}
    if faults := build_faults(capability):
        sys.exit("\n".join(faults))


def driver() -> str | None:
    """Return the version of the device's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(text.stdout.split()), None)


def build_faults(capability: tuple[int, int]) -> list[str]:
    """Say why the loaded kernels do not fit the sources or a device."""
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
    return faults


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


# --- tests ----------------------------------------------------------------------------


def tests(device: str, paths: Sequence[str] = TESTS) -> Iterator[Found]:
    """Run the tests that use a GPU; count them by result, one by one."""
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *paths]
    result = re.compile(r"::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$")
    counts: Counter[str] = Counter()
    process = start(command)
    for line in lines_of(process):
        if found := result.search(line.rstrip()):
            counts[found[1].lower()] += 1
            yield {"tests": {"counts": dict(counts)}}
    if process.returncode:
        sys.exit(f"tests: exit {process.returncode}")


# --- compute-sanitizer ----------------------------------------------------------------


def sanitize(tool: str, device: str) -> Iterator[Found]:
    """Run the small cases under a tool of compute-sanitizer, our kernels alone.

    initcheck watches all kernels: it must see what torch's own ones write. Every tensor
    gets an allocation of its own, so that no access beyond it is missed.

    Raises:
        NotHere: where it is not installed or can't run on the device.
    """
    command = [find_program("compute-sanitizer"), "--tool", tool]
    command += ["--error-exitcode", str(FOUND), "--print-limit", "20"]
    if tool != "initcheck":
        command += ["--kernel-name", "kns=fisherprune"]
    command += [sys.executable, "-m", "benchmarks.gpu.cases", "--device", device]
    process = start(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    output = "".join(lines_of(process))
    if "Device not supported" in output:
        raise NotHere("compute-sanitizer does not support this device")
    found = errors_counted(output)
    yield {"sanitizer": {tool: {"found": found}}}
    if process.returncode or found != 0:
        sys.exit(f"{tool}: exit {process.returncode}, found {found}")


def errors_counted(output: str) -> int | None:
    """Read the sanitizer's own summary; None where there is none."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    return int(summary[1]) if summary else None
