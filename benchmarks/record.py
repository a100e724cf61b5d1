"""The record of a benchmark: where it was measured, its table, its result file."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch

from fisherprune.commandline import Parser, run_command
from fisherprune.errors import shown
from fisherprune.ops import kernels

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SOURCES = ("--", ".", ":(exclude)benchmarks/results")
"""Paths whose changes count, for git: not what the benchmarks themselves write."""
PEERS = ("numpy", "backpack-for-pytorch", "opacus", "sparseprop")
"""Packages that fisherprune is timed beside, torch aside."""


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return where and with what the numbers were measured."""
    cuda = torch.device(device).type == "cuda"
    others = {name: _version(name) for name in PEERS}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": _cpu_model(),
        "cpu_capability": kernels.cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "fisherprune": _version("fisherprune"),
        "peers": {name: version for name, version in others.items() if version},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", *SOURCES)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # also a source folder's own
        return None


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(ROOT), *words]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all.

    Raises:
        ValueError: where the record holds NaN or infinity, which are no results.
    """
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as aligned text; columns in the order of their first mention."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    left = [all(isinstance(r.get(c, ""), str) for r in rows) for c in columns]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, left, strict=True)
        return "  ".join(
            t.ljust(w) if to_left else t.rjust(w) for t, w, to_left in aligned
        )

    return "\n".join(line(texts).rstrip() for texts in [columns, *cells])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class Program(Protocol):
    """What ``python -m`` runs; returns the exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Do the work."""
        ...


def program(name: str) -> Callable[[Callable[..., int | None]], Program]:
    """Make a function of the command line a program: a mistake is one line and code 2.

    The function returns its exit code, or nothing for 0.
    """

    def decorate(main: Callable[..., int | None]) -> Program:
        @wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            return run_command(f"python -m {name}", lambda: main(argv) or 0)

        return run

    return decorate


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Add the option of how often is measured."""
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=7,
        metavar="N",
        help="samples per competitor",
    )


def at_least_one(text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        ArgumentTypeError: where it is something else.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 1, got {shown(text)}"
        )
    return int(text)


def usable_device(text: str) -> str:
    """Read a device on which torch can make a tensor.

    Raises:
        ArgumentTypeError: where it is something else.
    """
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):  # unknown, not there, not built in
        raise argparse.ArgumentTypeError(
            f"must be a device that torch can use here, got {shown(text)}"
        ) from None
    return text


def arguments(name: str, description: str | None) -> Parser:
    """Return a parser with the options that all benchmarks share."""
    parser = Parser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--device", type=usable_device, default="cpu", help="cpu (default), cuda:1, ..."
    )
    add_rounds(parser)
    parser.add_argument("--output", type=Path, help="result file, default in results/")
    parser.add_argument("--plot", action="store_true", help="draw a PNG beside it")
    return parser


def finish(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    limits: Mapping[str, float],
    device: str | torch.device,
    path: Path | None,
) -> Path:
    """Print the table, write the result file, return its path."""
    place = environment(device)
    path = path or RESULTS / f"{name}-{torch.device(device).type}.json"
    write_json(
        path,
        {"benchmark": name, "environment": place, "ceilings": limits, "rows": rows},
    )
    print(table(rows))
    print("ceilings:", ", ".join(f"{k} {v:.4g}" for k, v in limits.items()))
    print(f"{place['device']}, {place['cpu']}, {place['threads']} threads -> {path}")
    return path
