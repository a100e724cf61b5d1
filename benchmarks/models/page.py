"""The page of the table: a row for each family, what is slow or refused below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

FUSED = frozenset(
    "linear inner addmm matmul mm bmm _grouped_mm conv1d conv2d conv3d".split()
)
"""Functions whose weights' gradients the kernels take."""
Record = Mapping[str, Any]
KINDS = ("fused", "rows", "vmap", "loop", "unused", "none")
TITLE = """\
# Models

Which part of a model is covered, in which way, and with what error. Every number comes
from runs of `python -m benchmarks.models`; this page is written by it.

Each model is made without pretrained weights, moved off the constants that its
parameters begin with (a branch that begins at zero has no gradients), and run with two
samples. Of each family of torchvision it is the smallest model; of each file of timm's
models the one whose name says that it is the smallest, on the smallest images that it
takes, and with options for fewer blocks or channels, as written, where that is still
large; those of the others are tiny ones, made from configurations. Columns:

- *family*: models that share their layers.
- *pruned by default*: share of the weights that `fisherprune.prunable_parameters`
  chooses. Everything else can be chosen by name, and has gradients in the same ways.
- *ways*: shares of all trainable weights, as `fisherprune.check` says: **fused** by the
  kernels, no gradient of a sample in memory; **rows** by a rule for its function;
  **vmap** through the function, sample by sample; **loop**, the model is run for each
  sample alone; unused, where no loss depends on it.
- *error*: the largest relative error (in norm, of a parameter) of the Fisher diagonal F
  against a loop over single samples in float64, the model in float64, too: it shows
  whether the ways are right.
- *in float32*: the same of the model in float32, and, behind the stroke, of a loop in
  float32. Where both are large it is the model that lets rounding grow: a ReLU that
  rounds to its other side changes gradients. Of a model that does not run in float64
  the first one alone, against the loop in float32.
"""


def page(records: Iterable[Record]) -> str:
    """Return the page of the libraries' result files."""
    return "\n".join([TITLE, *(line for each in records for line in of_library(each))])


def of_library(record: Record) -> Iterable[str]:
    """Yield a library's heading, table and sentences."""
    place, rows = record["environment"], record["rows"]
    good = [row for row in rows if is_covered(row)]
    yield f"## {rows[0]['library']} {place['library']}\n"
    yield f"{len(good)} of {len(rows)} models: every weight is covered."
    yield f"Tried with torch {place['torch']}, commit {commits(place, rows)}.\n"
    yield "| family | model | weights | pruned by default | ways | error | in float32 |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    yield from map(line, rows)
    yield ""
    sentences = dict.fromkeys(note for row in rows for note in notes(row))
    yield from (f"- {sentence}" for sentence in sentences)
    if sentences:
        yield ""


def commits(place: Record, rows: Iterable[Record]) -> str:
    """Return the commits that rows are of: that of the file where a row names none."""
    every = ({**place, **row} for row in rows)
    states = ((each["commit"][:10], each["dirty"]) for each in every)
    return ", ".join(
        f"{name}{', changed' if dirty else ''}" for name, dirty in dict.fromkeys(states)
    )


def is_covered(row: Mapping[str, Any]) -> bool:
    """Return whether there is a way for all weights that a loss depends on."""
    return "refused" not in row and not row["ways"].get("none")


def line(row: Mapping[str, Any]) -> str:
    """Return a model's row."""
    if "refused" in row:
        return f"| {row['family']} | {row['model']} | | | refused | | |"
    shares = ", ".join(
        f"{kind} {share:.1%}" for kind, share in shares_of(row["ways"]).items()
    )
    single = row.get("float32 error"), row.get("float32 loop's error")
    cells = [
        row["family"],
        row["model"],
        f"{row['weights']:,}",
        f"{row['prunable']:.1%}",
        shares,
        number(row.get("error")),
        " / ".join(map(number, single)),
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Return two digits."""
    return "-" if value is None else f"{value:.1e}"


def shares_of(ways: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of kinds of ways, none that is zero."""
    shares = dict.fromkeys(KINDS, 0.0)
    for way, share in ways.items():
        kind = "fused" if way in FUSED or way.startswith("conv_transpose") else way
        shares[kind if kind in KINDS else "rows"] += share
    return {kind: share for kind, share in shares.items() if share}


def notes(row: Mapping[str, Any]) -> Iterable[str]:
    """Yield why a model is refused, or weights go slow ways."""
    if "refused" in row:
        yield f"{row['family']}: {row['refused'].splitlines()[0]}"
    elif slow := [why for why in row["reasons"] if not why.startswith("no loss of")]:
        yield from (f"{row['family']}: {why}" for why in slow)
