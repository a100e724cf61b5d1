"""``python -m benchmarks.models``: tries models of other libraries, writes the table.

Each is made without a network, moved off the constants that it begins with, and asked
three things: which share of its weights is pruned by default, in which ways the
gradients of all its weights are found, and how far F is from a float64 loop over single
samples. The rows of a library go to ``benchmarks/results/models-LIBRARY.json``, and all
that are there to ``docs/models.md``; ``--page`` writes that alone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models.case import Case
from benchmarks.models.language import peft_models, transformers_models
from benchmarks.models.measure import Row, measure
from benchmarks.models.page import Record, page
from benchmarks.models.vision import timm_models, torchvision_models
from benchmarks.record import RESULTS, ROOT, environment, program, write_json
from fisherprune.commandline import Parser

LIBRARIES = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
    "peft": peft_models,
}
PAGE = ROOT / "docs" / "models.md"


def cases(
    library: str, families: Sequence[str] = (), every: bool = False
) -> Iterator[Case]:
    """Yield the cases of a library, of these families alone where some are named."""
    for case in LIBRARIES[library](every):
        if not families or case.family in families:
            yield case


def tried(case: Case) -> Row:
    """Return a model's row, with the error where it ends in one."""
    try:
        return measure(case)
    except Exception as error:
        row = {"library": case.library, "family": case.family, "model": case.name}
        return row | {"refused": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        return_memory()


def return_memory() -> None:
    """Return freed memory to the system: what models leave is in many pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def try_library(library: str, families: Sequence[str], every: bool, to: Path) -> None:
    """Try a library's models and write the rows after each.

    Where families are named, the rows of others stay, each with its own commit.
    """
    place = environment() | {"library": importlib.metadata.version(library)}
    file, before, rows = to / f"models-{library}.json", dict[Key, Row](), list[Row]()
    if families and file.is_file():
        old = json.loads(file.read_text())
        before = {key(r): {**commit(old["environment"]), **r} for r in old["rows"]}
    for case in cases(library, families, every):
        rows.append(tried(case) | commit(place))
        print(rows[-1], flush=True)
        every_row = [*(before | {key(row): row for row in rows}).values()]
        record = {"benchmark": "models", "environment": place, "rows": every_row}
        write_json(file, record)


Key = tuple[str, str]


def key(row: Row) -> Key:
    """Return what a row is of: its file has one row of it."""
    return row["family"], row["model"].partition(",")[0]


def commit(place: Mapping[str, Any]) -> Row:
    """Return the commit that a row is of, and whether files were changed."""
    return {"commit": place["commit"], "dirty": place["dirty"]}


def read(folder: Path = RESULTS) -> list[Record]:
    """Return the libraries' result files that are there."""
    files = [folder / f"models-{library}.json" for library in LIBRARIES]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


@program("benchmarks.models")
def main(argv: Sequence[str] | None = None) -> None:
    """Try the models, then write the page."""
    parser = Parser("python -m benchmarks.models", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=[*LIBRARIES])
    parser.add_argument("--family", nargs="+", default=[], help="of these alone")
    parser.add_argument("--every", action="store_true", help="torchvision's every one")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of results"
    )
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args(argv)
    for library in () if options.page else options.only:
        try_library(library, options.family, options.every, options.output)
    if options.output == RESULTS:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(read()))


if __name__ == "__main__":
    sys.exit(main())
