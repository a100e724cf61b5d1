"""The command line of ``python -m fisherprune.train``: it only fills a TrainConfig."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NamedTuple

from fisherprune.commandline import Parser, number, path, reader, whole
from fisherprune.errors import FisherpruneError
from fisherprune.masks.densities import read_densities
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import read_config
from fisherprune.runs.option import about, names
from fisherprune.runs.parts.data import DataConfig
from fisherprune.runs.parts.mask import MaskConfig
from fisherprune.runs.parts.training import TrainingConfig
from fisherprune.train.ranks import job_here

DESCRIPTION = """\
Prune a network at initialization and train what is left.

Scores every weight on the training images, keeps the best, trains, and tests the
weights of the last epoch and those of the best validation (by default on 20 % of the
training images, stratified, the same in every run). The defaults are the setting of
Table 1 of arXiv 2502.11450v1. A first try that needs no data and a minute:

  python -m fisherprune.train --dataset digits --model resnet20 --epochs 10

Several processes share each batch and give the results of one up to rounding; the first
line starts them itself, the second as torchrun can, on several machines too:

  python -m fisherprune.train --processes 2
  torchrun --nproc-per-node 2 -m fisherprune.train
"""

PARTS = {"mask": MaskConfig, "data and network": DataConfig, "training": TrainingConfig}
"""Groups of the help; what is in none of them, the seed too, is the group ``run``."""

READERS: dict[str, tuple[Callable[[str], object], str]] = {
    "int": (whole, "N"),
    "float": (number, "X"),
    "str": (str, "NAME"),
    "tuple[int, ...]": (whole, "EPOCH"),
    "tuple[str, ...]": (str, "PART"),
    "Mapping[str, float]": (reader(lambda text: read_densities(path(text))), "FILE"),
}
"""How the values of an option are read and what the help calls them, by type."""


class Command(NamedTuple):
    """What a command line asks for."""

    config: TrainConfig
    folder: Path | None
    """Of the run to resume; None begins a new one."""
    quiet: bool


def parse(argv: Sequence[str] | None = None) -> Command:
    """Return what a command line asks for; the config of a resumed run is its own.

    Raises:
        FisherpruneError: for unknown options and values that no run can have, and for
            options beside ``--resume`` that would make it another run.
    """
    given = vars(make_parser().parse_args(argv))
    quiet, folder = given.pop("quiet"), given.pop("resume")
    if folder is None:
        if given.get("method") == "none":
            given.setdefault("sparsity", 0.0)
        if job := job_here():
            given.setdefault("processes", job.size)
        return Command(TrainConfig(**given), None, quiet)
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise FisherpruneError(
            f"--resume takes all settings from the run, got {options} too"
        )
    return Command(read_config(folder), folder, quiet)


def make_parser() -> Parser:
    """Build the parser: one option for each field that can be given, and two more.

    Only options that are given come out, ``--quiet`` and ``--resume`` always.
    """
    parser = Parser(
        "python -m fisherprune.train",
        usage="%(prog)s [OPTION ...]",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    left = {f.name: f for f in fields(TrainConfig) if about(f).given}
    seed = left.pop("seed")
    for title, part in PARTS.items():
        group = parser.add_argument_group(title)
        for name in names(part):
            if name in left:
                add_option(group, left.pop(name))
    group = parser.add_argument_group("run")
    for field in (seed, *left.values()):
        add_option(group, field)
    group.add_argument(
        "--resume",
        type=path,
        default=None,
        metavar="FOLDER",
        help="go on with the unfinished run in its folder, alone or with --quiet",
    )
    group.add_argument(
        "--quiet",
        action="store_true",
        default=False,
        help="no progress, only the final table",
    )
    return parser


def add_option(group: Any, field: Field) -> None:
    """Add the option of a field; its type says how to read the value."""
    option = f"--{field.name.replace('_', '-')}"
    kind = str(field.type).removesuffix(" | None")
    text = about(field).help.replace("%", "%%")
    if kind == "bool":
        group.add_argument(option, action="store_true", help=text)
        return
    if field.default is not None and "default:" not in text:
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    read, metavar = READERS[kind]
    many = {"nargs": "*"} if kind.startswith("tuple") else {}
    group.add_argument(
        option, type=read, metavar=about(field).metavar or metavar, help=text, **many
    )
