"""``python -m benchmarks.models``: tries models of other libraries, writes the table.

Each is made without a network, moved off the constants that it begins with, and asked
three things: which share of its weights is pruned by default, in which ways the
gradients of all its weights are found, and how far F is from a float64 loop over single
samples. The rows go to ``benchmarks/results/models.json``, and from there to
``docs/models.md``; ``--page`` writes that alone.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.models.case import Case
from benchmarks.models.language import peft_models, transformers_models
from benchmarks.models.measure import Row, measure
from benchmarks.models.page import page
from benchmarks.models.vision import timm_models, torchvision_models
from benchmarks.record import RESULTS, ROOT, environment, program, write_json
from fisherprune.commandline import Parser

LIBRARIES = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
    "peft": peft_models,
}
FILE = RESULTS / "models.json"
PAGE = ROOT / "docs" / "models.md"


def cases(
    libraries: Sequence[str], families: Sequence[str] = (), every: bool = False
) -> Iterator[Case]:
    """Yield the cases of libraries, of these families alone where some are named."""
    for library in libraries:
        for case in LIBRARIES[library](every):
            if not families or case.family in families:
                yield case


def versions() -> dict[str, str]:
    """Return those of the libraries that the models are from."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def tried(case: Case) -> Row:
    """Return a model's row, with the error where it ends in one."""
    try:
        return measure(case)
    except Exception as error:
        row = {"library": case.library, "family": case.family, "model": case.name}
        return row | {"refused": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()


@program("benchmarks.models")
def main(argv: Sequence[str] | None = None) -> None:
    """Try the models; write the rows after each, and the page at the end."""
    parser = Parser("python -m benchmarks.models", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=[*LIBRARIES])
    parser.add_argument("--family", nargs="+", default=[], help="of these alone")
    parser.add_argument("--every", action="store_true", help="torchvision's every one")
    parser.add_argument("--output", type=Path, default=FILE, help="result file")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    place = environment() | {"peers": versions()}
    record = {"benchmark": "models", "environment": place, "rows": rows}
    chosen = options.only, options.family, options.every
    for case in () if options.page else cases(*chosen):
        rows.append(tried(case))
        print(rows[-1], flush=True)
        write_json(options.output, record)
    if options.output == FILE:
        PAGE.write_text(page(json.loads(FILE.read_text())))


if __name__ == "__main__":
    sys.exit(main())
