"""``fisherprune check``: how the gradients of a network would be found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from fisherprune.commandline import Parser, prepare, run_command

if __name__ == "__main__":
    prepare()

from fisherprune.runs.config import TrainConfig
from fisherprune.runs.device import resolve_device
from fisherprune.runs.option import about, names
from fisherprune.runs.parts.data import DataConfig
from fisherprune.statistics.check import SAMPLES, check
from fisherprune.train.images import load_images
from fisherprune.train.network import network
from fisherprune.train.options import add_option

DESCRIPTION = """\
Say of each parameter of a network in which way its per-sample gradients are found, or
why they can't be, and which settings matter. Runs a few training images; nothing is
written. The exit code is 0 whatever the table says.

  fisherprune check --dataset digits --model resnet20
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    return run_command("fisherprune.check", lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    config = TrainConfig(**vars(make_parser().parse_args(argv)))
    device = resolve_device(config.device)
    images = load_images(config, None, device, quiet=False)
    batch = next(iter(images.scoring.batches(SAMPLES)))
    print(check(network(config, images.train), batch))
    return 0


def make_parser() -> Parser:
    """Build the parser, of the options of a run for its images and network."""
    parser = Parser(
        "fisherprune check",
        usage="%(prog)s [OPTION ...]",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    wanted = {*names(DataConfig), "device"}
    for field in fields(TrainConfig):
        if field.name in wanted and about(field).given:
            add_option(parser, field)
    return parser


if __name__ == "__main__":
    sys.exit(main())
