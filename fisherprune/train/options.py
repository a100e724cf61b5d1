"""The command line of ``python -m fisherprune.train``: it only fills a TrainConfig."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import NamedTuple

from fisherprune.commandline import Parser, number, path, reader, whole
from fisherprune.data import IMAGE_SIZES
from fisherprune.errors import FisherpruneError
from fisherprune.masks.densities import read_densities
from fisherprune.models import MODELS
from fisherprune.runs.config import (
    BATCH_SIZES,
    MEMORY_FORMATS,
    VALIDATION_METRICS,
    TrainConfig,
)
from fisherprune.runs.folder import read_config
from fisherprune.scoring.criteria import criteria

DESCRIPTION = """\
Prune a network at initialization and train what is left.

Scores every weight on the training images, keeps the best, trains, and tests the
weights of the last epoch and those of the best validation (on 20 % of the training
images, stratified, the same in every run). The defaults are the setting of
Table 1 of arXiv 2502.11450v1. A first try that needs no data and a minute:

  python -m fisherprune.train --dataset digits --model resnet20 --epochs 10
"""


def _by_dataset(defaults: dict[str, int]) -> str:
    return f"(default: {', '.join(f'{k} {v}' for k, v in defaults.items())})"


GROUPS = {
    "mask": {
        "method": f"criterion: {', '.join(criteria())}; none trains densely",
        "sparsity": "fraction of the prunable weights removed, from 0 to 1 "
        "(default: 0.9, or 0 for method none)",
        "scope": "where scores compete: global (one threshold), layer (the same "
        "sparsity in each), erk (Erdos-Renyi-kernel densities) or densities (given "
        "ones, scaled to the sparsity)",
        "densities": "relative density of each parameter for scope densities: a JSON "
        'file {"PARAMETER": NUMBER, ...} or the masks.safetensors of another run',
        "skip": "prune all parameters but those with one of these parts in their name; "
        "'bias linear bn' is the choice of the published FTS code (default: the "
        "weights of Conv and Linear layers but the classifier)",
        "invert_scores": "sanity check: keep the smallest scores",
        "shuffle_masks": "sanity check: permute each mask within its layer",
        "reinitialize": "sanity check: draw new initial weights under the mask",
        "group_size": "samples whose mean gradient is squared as one; 1 is the exact "
        "empirical Fisher",
        "warmup_epochs": "epochs of dense training before the scoring",
        "bn_warmup": "before the scoring, set the BatchNorm statistics to those of the "
        "training images; the weights stay",
        "score_samples": "score on a stratified subset of this many training images "
        "(default: all)",
        "score_batch_size": "images scored at a time; more take more memory, the "
        "scores are the same",
    },
    "data and network": {
        "model": f"network: {', '.join(MODELS)}",
        "dataset": f"images: {', '.join(IMAGE_SIZES)}. folder reads image files "
        "DATA_DIR/train/CLASS/* and DATA_DIR/test/CLASS/*; digits is built in",
        "data_dir": "folder of the data, cifar10 and cifar100 are downloaded to it",
        "data_mirror": "download the archive from the folder at this address instead "
        "of its authors' server; it must have the same checksum",
        "image_size": "resize the images to this height and width "
        f"{_by_dataset(IMAGE_SIZES)}",
        "train_samples": "train on a stratified subset of this many images "
        "(default: all)",
    },
    "training": {
        "epochs": "epochs after the mask is made",
        "batch_size": "images a step; the last step of an epoch takes what is left "
        f"{_by_dataset(BATCH_SIZES)}",
        "lr": "learning rate of SGD",
        "momentum": "momentum of SGD",
        "weight_decay": "weight decay of SGD",
        "lr_drops": "epochs after which the learning rate drops",
        "lr_drop_factor": "what it is multiplied by at each drop",
        "validation_every": "epochs from one validation to the next",
        "validation_metric": "what the best weights are best in: "
        f"{', '.join(VALIDATION_METRICS)}",
        "amp": "train in bfloat16 (autocast); scores and tests stay float32",
        "memory_format": f"of images and weights: {', '.join(MEMORY_FORMATS)}",
        "compile": "train through torch.compile: slow to start, then faster",
    },
    "run": {
        "seed": "of all random choices but the train/validation split",
        "device": "auto (cuda where there is one), cpu, cuda or cuda:INDEX",
        "output_dir": "the run makes a folder of its own in it",
        "tensorboard": "write the metrics for TensorBoard too",
    },
}
"""Help of every field of TrainConfig, by group."""

READERS: dict[str, Callable[[str], object]] = {
    "int": whole,
    "float": number,
    "str": str,
    "tuple[int, ...]": whole,
    "tuple[str, ...]": str,
    "Mapping[str, float]": reader(lambda text: read_densities(path(text))),
}
"""How the values of an option are read, by the field's type."""

METAVARS = {
    "method": "CODE",
    "data_dir": "DIR",
    "data_mirror": "URL",
    "output_dir": "DIR",
    "int": "N",
    "float": "X",
    "str": "NAME",
    "tuple[int, ...]": "EPOCH",
    "tuple[str, ...]": "PART",
    "densities": "FILE",
}
"""What the help calls an option's value, by name or else by type."""


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
        return Command(TrainConfig(**given), None, quiet)
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise FisherpruneError(
            f"--resume takes all settings from the run, got {options} too"
        )
    return Command(read_config(folder), folder, quiet)


def make_parser() -> Parser:
    """Build the parser: one option for each field of TrainConfig, and two more.

    Only options that are given come out, ``--quiet`` and ``--resume`` always.
    """
    parser = Parser(
        "python -m fisherprune.train",
        usage="%(prog)s [OPTION ...]",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    by_name = {field.name: field for field in fields(TrainConfig)}
    for title, helps in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            _add(group, by_name[name], text)
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


def _add(group, field: Field, text: str) -> None:
    """Add the option of a field; its annotation says how to read the value."""
    option = f"--{field.name.replace('_', '-')}"
    kind = field.type.removesuffix(" | None")
    text = text.replace("%", "%%")
    if kind == "bool":
        group.add_argument(option, action="store_true", help=text)
        return
    if field.default is not None and "default:" not in text:
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    many = {"nargs": "*"} if kind.startswith("tuple") else {}
    group.add_argument(
        option,
        type=READERS[kind],
        metavar=METAVARS.get(field.name) or METAVARS[kind],
        help=text,
        **many,
    )
