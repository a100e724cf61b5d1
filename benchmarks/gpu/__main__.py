"""``python -m benchmarks.gpu``: everything that needs a GPU, in one timed command.

Checks the build, runs the tests of CUDA, measures the numbers a GPU must reach
(``benchmarks.gpu.rows``) and runs small cases under compute-sanitizer, without network.
Each step has its time, and what earlier steps leave over; what does not fit is listed
as not run. The result file is written after every step, so that no later one can take
it away. Exit status: 0, 1 where a step, a test or a sanitizer failed (a missed target
is no failure), 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu.measure import NotHere
from benchmarks.gpu.steps import (
    Budget,
    Failed,
    Record,
    Step,
    Unusable,
    failures,
    new_record,
    run,
)
from benchmarks.record import RESULTS, environment, table, write_json
from fisherprune.ops import kernels

PROGRAM = "python -m benchmarks.gpu"
PARTS = ("build", "tests", "sanitizer", "benchmarks")
# For all steps together: a machine that is lent for ten minutes builds the kernels
# first, which takes up to one.
MINUTES = 8.5


# --- steps ----------------------------------------------------------------------------


def check_build(seconds: float) -> Record:
    """Compare the loaded kernels with the sources and the device; import the rest.

    Raises:
        Unusable: where they do not fit, or a later step could not start.
    """
    facts = gpu_checks.build_facts(torch.cuda.get_device_capability())
    if faults := facts.pop("faults") + gpu_checks.import_faults():
        raise Unusable("\n".join(faults))
    return {"build": facts}


def run_tests(seconds: float) -> Record:
    """Run the tests that use a GPU."""
    outcome = gpu_checks.run_limited(gpu_checks.pytest_command(), seconds)
    return {"tests": gpu_checks.pytest_result(outcome)}


def run_benchmark(name: str, seconds: float) -> Record:
    """Run one step of ``benchmarks.gpu.rows``.

    Raises:
        Failed: where it did not come to its end; with what it found before.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.gpu.rows", name]
        outcome = gpu_checks.run_limited([*command, "--output", str(path)], seconds)
        found = json.loads(path.read_text()) if path.exists() else {}
        if outcome.status != 0:
            raise Failed(outcome, found)
    if "not_run" in found:
        raise NotHere(found["not_run"])
    return found


def run_sanitizer(tool: str, seconds: float) -> Record:
    """Run the small cases under one tool of compute-sanitizer.

    Raises:
        NotHere: where it can't run on the device, or not in the time.
    """
    command = gpu_checks.sanitizer_command(gpu_checks.find_sanitizer(), tool)
    more = gpu_checks.sanitizer_environment()
    outcome = gpu_checks.run_limited(command, seconds, more)
    if reason := gpu_checks.why_not_sanitized(outcome):
        raise NotHere(reason)
    return {"sanitizer": {tool: gpu_checks.sanitizer_result(outcome)}}


BENCHMARKS = {
    "ceilings": (25, "matmul in fp32, TF32 and bf16; memory copy and read"),
    "scoring": (45, "fts scores of 40,000 images, ResNet18; the one-image loop"),
    "topk": (35, "11.2 M scores to masks, with ties, for five; cat + topk"),
    "kernel": (35, "grad_moments on the largest layers, over the TF32 matmul"),
    "pass-resnet18": (30, "gradient_moments over forward + backward"),
    "pass-vgg19": (30, "gradient_moments over forward + backward"),
    "memory": (15, "peak memory above forward + backward, batch 512"),
    "sequences": (10, "grad_moments of a transformer's layer, over the bf16 matmul"),
    "topk-large": (25, "2^30 scores to masks, over the copy bandwidth"),
}
"""Seconds and what is measured, the most telling first."""


def plan(parts: Sequence[str] = PARTS) -> list[Step]:
    """Return the steps of the chosen parts in the order in which they run."""
    tests = f"pytest {' '.join(gpu_checks.TESTS)}"
    steps = [
        Step("build", "build", 10, "CUDA kernels of these sources", check_build),
        Step("tests", "tests", 150, tests, run_tests),
    ]
    for name, (seconds, what) in BENCHMARKS.items():
        run = partial(run_benchmark, name)
        steps.append(Step("benchmarks", name, seconds, what, run))
    for tool in gpu_checks.TOOLS:  # slow: they take what the others leave over
        what = "small cases of both ops under compute-sanitizer"
        steps.append(Step("sanitizer", tool, 25, what, partial(run_sanitizer, tool)))
    return [step for step in steps if step.part in parts]


# --- where it runs, and the report ----------------------------------------------------


def place_of(commit: str | None) -> Record:
    """Return where and with what is measured; ``commit`` where git does not know."""
    place = environment("cuda")
    if place["commit"] is None:
        place |= {"commit": commit, "dirty": None}
    major, minor = torch.cuda.get_device_capability()
    return place | {
        "driver": driver(),
        "capability": f"{major}.{minor}",
        "memory_gb": round(torch.cuda.mem_get_info()[1] / 1e9, 1),
        "source_hash": kernels.SOURCE_HASH,
    }


def driver() -> str | None:
    """Return the version of the device's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(text.stdout.split()), None)


def slug(name: str) -> str:
    """Return a device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report(record: Record) -> str:
    """Return the page to print."""
    columns = ("name", "value", "unit", "q1", "q3", "n", "target", "holds")
    words = {True: "yes", False: "NO", None: None}
    rows = [{c: r.get(c) for c in columns} for r in record["rows"]]
    lines = [table([r | {"holds": words[r["holds"]]} for r in rows])] if rows else []
    lines += [f"{name}: {value:.4g}" for name, value in record["ceilings"].items()]
    for name, result in {"tests": record["tests"], **record["sanitizer"]}.items():
        if result:
            verdict = "ok" if result["ok"] else "FAILED"
            seen = result.get("counts", result.get("found"))
            lines += [f"{name}: {verdict}, {result['ended']}, {seen}"]
            lines += [f"    {line}" for line in result.get("tail", [])]
    for name, result in record["failed"].items():
        lines += [f"{name}: FAILED, {result['why']}"]
        lines += [f"    {line}" for line in result["tail"]]
    lines += [f"{name}: not run: {why}" for name, why in record["not_run"].items()]
    return "\n".join(lines)


def outline(steps: Sequence[Step], minutes: float) -> str:
    """Return what a run would do."""
    rows = [
        {"part": s.part, "step": s.name, "seconds": s.seconds, "what": s.what}
        for s in steps
    ]
    total = sum(step.seconds for step in steps)
    return f"{table(rows)}\n{total:g} s at most, of {minutes:g} minutes"


def chosen_parts(text: str) -> list[str]:
    """Parse ``--only``."""
    parts = text.split(",")
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(
            f"parts must be of {','.join(PARTS)}, got {','.join(sorted(unknown))}"
        )
    return parts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="list the steps, no more"
    )
    parser.add_argument(
        "--only",
        type=chosen_parts,
        default=PARTS,
        metavar="PARTS",
        help=f"those of {','.join(PARTS)} to run, with commas; default all",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="for all steps, without the build of the kernels; default %(default)s",
    )
    parser.add_argument("--output", type=Path, help="result file, default in results/")
    parser.add_argument("--commit", help="of the sources, where git does not know it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts on the current device."""
    options = parse(argv)
    budget, steps = Budget(options.minutes * 60), plan(options.only)
    if options.dry_run:
        print(outline(steps, options.minutes))
        return 0
    if not torch.cuda.is_available():
        print(f"{PROGRAM}: torch {torch.__version__} finds no GPU", file=sys.stderr)
        return 2
    record = new_record(place_of(options.commit))
    name = f"gpu-{slug(record['environment']['device'])}.json"
    path = options.output or RESULTS / name
    try:
        run(steps, budget, record, partial(write_json, path))
    except Unusable as faults:
        for fault in str(faults).splitlines():
            print(f"{PROGRAM}: {fault}", file=sys.stderr)
        return 2
    print(report(record))
    print(f"{record['environment']['device']} -> {path}")
    return int(bool(failures(record)))


if __name__ == "__main__":
    sys.exit(main())
