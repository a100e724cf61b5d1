"""``python -m benchmarks.gpu``: everything that needs a GPU, in one timed command.

Checks the build, runs the tests of CUDA and measures the numbers a GPU must reach;
``--steps`` chooses others, as the sanitizers. It needs no network. Each step is a
process with a fixed time limit; one that would not fit into the minutes that are left
is listed as not run. The result file is written after every step, so that a kill loses
one step alone. Exit status: 0, 1 where a step, a test or a sanitizer failed (a missed
target is no failure), 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.measure import Found
from benchmarks.gpu.steps import BUILD, GROUPS, STEPS, Step, add
from benchmarks.record import RESULTS, ROOT, program, table, write_json
from fisherprune.commandline import Parser, number
from fisherprune.errors import FisherpruneError

PROGRAM = "python -m benchmarks.gpu"
# For all steps together: a machine that is lent for ten minutes builds the kernels
# first, which takes up to one.
MINUTES = 9.0
TAIL = 30  # lines of a failed step's output that are kept


# --- steps ----------------------------------------------------------------------------


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


def run_limited(command: Sequence[str], seconds: float) -> Outcome:
    """Run a command in the root folder; end it and its children after ``seconds``."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # the session has its number
                process.wait()
        output.seek(0)
        return Outcome(status, output.read().decode(errors="replace"))


def run_step(step: Step) -> Found:
    """Run one step; return what it found, and where it failed how."""
    print(f"{step.name}, at most {step.seconds:g} s", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.json")
        command = [sys.executable, "-m", "benchmarks.gpu.steps", step.name]
        outcome = run_limited([*command, "--output", str(path)], step.seconds)
        found: Found = json.loads(path.read_text()) if path.exists() else {}
    if outcome.status != 0:
        why = {"why": outcome.ending, "tail": outcome.tail}
        found["failed"] = {step.name: why}
    return found | {"seconds": {step.name: round(time.monotonic() - start, 1)}}


def run(
    steps: Sequence[Step], end: float, record: Found, write: Callable[[], None]
) -> None:
    """Run the steps one after the other; write after each.

    Args:
        steps: in their order.
        end: of the time for all, by ``time.monotonic``.
        record: what is found is added to it.
        write: writes the record.
    """
    for step in steps:
        left = end - time.monotonic()
        if step.seconds > left:
            why = f"needs {step.seconds:g} s, {max(left, 0):.0f} s are left"
            add(record, {"not_run": {step.name: why}})
        else:
            add(record, run_step(step))
        write()


def check_build(commit: str | None) -> Found:
    """Return a record that holds the machine and the kernels, no more yet.

    Raises:
        FisherpruneError: where they do not fit each other, or no step could start.
    """
    if not torch.cuda.is_available():
        raise FisherpruneError(f"torch {torch.__version__} finds no GPU")
    record: Found = {"benchmark": "gpu", "rows": []}
    groups = ("ceilings", "tests", "sanitizer", "not_run", "failed", "seconds")
    record |= {group: {} for group in groups}
    add(record, run_step(BUILD))
    if record["failed"]:
        failed = record["failed"][BUILD.name]
        raise FisherpruneError("\n".join([f"build: {failed['why']}", *failed["tail"]]))
    if record["environment"]["commit"] is None:
        record["environment"] |= {"commit": commit, "dirty": None}
    return record


# --- report ---------------------------------------------------------------------------


def report(record: Found) -> str:
    """Return the page to print."""
    columns = ("name", "value", "unit", "q1", "q3", "n", "target", "holds")
    words = {True: "yes", False: "NO", None: None}
    rows = [{c: r.get(c) for c in columns} for r in record["rows"]]
    lines = [table([r | {"holds": words[r["holds"]]} for r in rows])] if rows else []
    lines += [f"{name}: {value:.4g}" for name, value in record["ceilings"].items()]
    for name, found in record.get("profile", {}).items():
        lines += ["", name, table(found)]
    lines += record.get("ncu", [])
    lines += [f"tests: {found}" for found in record["tests"].values()]
    lines += [f"{tool}: {found}" for tool, found in record["sanitizer"].items()]
    for name, result in record["failed"].items():
        lines += [f"{name}: FAILED, {result['why']}"]
        lines += [f"    {line}" for line in result["tail"]]
    lines += [f"{name}: not run: {why}" for name, why in record["not_run"].items()]
    return "\n".join(lines)


def outline(steps: Sequence[Step], minutes: float) -> str:
    """Return what a run would do."""
    rows = [{"step": s.name, "seconds": s.seconds, "what": s.what} for s in steps]
    total = sum(step.seconds for step in steps)
    return f"{table(rows)}\n{total:g} s at most, of {minutes:g} minutes"


def default_path(device: str, chosen: Sequence[str]) -> Path:
    """Return the result file of a device; chosen steps replace no others' results."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"{'-'.join(['gpu', slug, *chosen])}.json"


# --- command line ---------------------------------------------------------------------


def positive(text: str) -> float:
    """Read a number above 0.

    Raises:
        ArgumentTypeError: where it is none.
    """
    if not number(text) > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(PROGRAM, description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="list the steps and their limits"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=[*GROUPS, *STEPS],
        default=[],
        metavar="NAME",
        help=f"those to run, of {', '.join([*GROUPS, *STEPS])}",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=MINUTES,
        help="for all steps, without the build of the kernels; default %(default)s",
    )
    parser.add_argument("--output", type=Path, help="result file, default in results/")
    parser.add_argument("--commit", help="of the sources, where git does not know it")
    return parser.parse_args(argv)


@program("benchmarks.gpu")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen steps on the current device."""
    options = parse(argv)
    steps = {
        step.name: step
        for name in options.steps or ["default"]
        for step in GROUPS.get(name) or [STEPS[name]]
    }
    steps.pop(BUILD.name, None)  # it runs in any case
    if options.dry_run:
        print(outline([BUILD, *steps.values()], options.minutes))
        return 0
    end = time.monotonic() + options.minutes * 60
    record = check_build(options.commit)
    device = record["environment"]["device"]
    path = options.output or default_path(device, options.steps)
    run([*steps.values()], end, record, lambda: write_json(path, record))
    print(report(record))
    print(f"{device} -> {path}")
    return int(bool(record["failed"]))


if __name__ == "__main__":
    sys.exit(main())
