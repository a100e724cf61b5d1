"""Tests run again in processes that use one set of vector instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CAPABILITIES = ["portable", "avx2", "avx512"]


def run_with(capability: str, file: str, calls: str) -> None:
    """Call what a file of tests defines; skip what this process has not."""
    from fisherprune.ops import kernels

    widest = kernels.cpu_capability()
    if CAPABILITIES.index(capability) > CAPABILITIES.index(widest):
        pytest.skip(f"this process has no {capability}")
    status, output = _results(file, calls, widest)[capability]
    assert status == 0 and output.splitlines()[0] == capability, output


@cache
def _results(file: str, calls: str, widest: str) -> dict[str, tuple[int, str]]:
    """Return exit status and output of the calls by capability.

    One process imports what all of them need, and forks for each.
    """
    path = Path(file)
    places = [HERE.parents[1], HERE, path.parent]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, path.stem, calls, widest],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def serve(module: str, calls: str, widest: str) -> None:
    """Write as JSON what comes of the calls, by capability."""
    import hypothesis  # noqa: F401
    import torch  # noqa: F401

    import fisherprune.ops  # noqa: F401

    wanted = CAPABILITIES[: CAPABILITIES.index(widest) + 1]
    print(json.dumps({each: _forked(each, module, calls) for each in wanted}))


def _forked(capability: str, module: str, calls: str) -> tuple[int, str]:
    """Return exit status and output of a child that has the capability."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os._exit(_run(capability, module, calls))
    os.close(write)
    with open(read) as pipe:
        output = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output


def _run(capability: str, module: str, calls: str) -> int:
    import torch

    from fisherprune.ops import kernels

    os.environ["FISHERPRUNE_CPU_CAPABILITY"] = capability
    try:
        print(kernels.cpu_capability(), f"torch.manual_seed({torch.seed()})", sep="\n")
        exec(f"from {module} import *\n{calls}", {})
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
