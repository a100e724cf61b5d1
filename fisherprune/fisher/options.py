"""The command line of ``fisherprune fisher``."""

from __future__ import annotations

import argparse
from typing import Any

from fisherprune.commandline import Parser, number, path, whole
from fisherprune.errors import FieldError
from fisherprune.fisher.samples import check_scale
from fisherprune.models import check_name
from fisherprune.runs.config import TrainConfig
from fisherprune.statistics.settings import LABELS, PLACES, Settings, checked_number

DESCRIPTION = """\
Compute the gradient moments of a model on labelled images, by the cross-entropy loss,
and write them to a file: their mean squares are the Fisher diagonal F. Prints a row for
each layer. The file is for fisherprune.GradientMoments.load, or any reader of
safetensors; it says which model, weights and data it is of.

  fisherprune fisher --model torchvision:resnet18 --weights resnet18.safetensors \\
      --images photos/train --image-size 224 --output fisher.safetensors
  fisherprune fisher --model nets.py:small --weights small.pt --data batch.pt \\
      --labels sampled --output fisher.safetensors
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, by which most pretrained networks have their images normalized."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options.

    Raises:
        FisherpruneError: for unknown options and values that none can have.
    """
    options = make_parser().parse_args(argv)
    TrainConfig(device=options.device, seed=options.seed)  # raises as for a run
    check_name(options.model)
    if options.output.is_dir():
        raise FieldError("output", "a file", f"the folder {options.output}")
    for name, least in (("group_size", 1), ("draws", 1), ("batch_size", 1)):
        checked_number(name, getattr(options, name), least)
    checked_number("image_size", options.image_size, 8)
    if options.classes is not None:
        checked_number("classes", options.classes, 2)
    if options.labels == "given" and options.draws != 1:
        raise FieldError("draws", "1 where labels are given", options.draws)
    Settings(**places(options))  # raises
    check_scale(options.mean, options.std)
    return options


def places(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say of where sums are kept."""
    return {name: getattr(options, name) for name in PLACES}


def make_parser() -> Parser:
    """Build the parser."""
    parser = Parser(
        "fisherprune fisher",
        usage="%(prog)s --model NAME (--images DIR | --data FILE)\n"
        "           --output FILE [OPTION ...]",
        description=DESCRIPTION,
    )
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_moments(parser.add_argument_group("moments"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="network: one of fisherprune's, torchvision:NAME, or a function of your "
        "own that returns one: MODULE:FUNCTION or FILE.py:FUNCTION",
    )
    group.add_argument(
        "--weights",
        type=path,
        metavar="FILE",
        help="its weights: safetensors, or a state_dict of torch.save (default: those "
        "it is built with, by the seed)",
    )
    group.add_argument(
        "--classes",
        type=whole,
        metavar="N",
        help="outputs of the network (default: as many as there are classes)",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", type=path, metavar="DIR", help="folder of images DIR/CLASS/*"
    )
    source.add_argument(
        "--data",
        type=path,
        metavar="FILE",
        help="file of two tensors, safetensors or of torch.save: inputs [N, C, S, S], "
        "which the network takes as they are, and labels [N]",
    )
    group.add_argument(
        "--image-size",
        type=whole,
        default=32,
        metavar="N",
        help="resize images to this height and width (default: %(default)s)",
    )
    for name, default in (("mean", MEAN), ("std", STD)):
        group.add_argument(
            f"--{name}",
            type=number,
            nargs=3,
            default=list(default),
            metavar=("R", "G", "B"),
            help=f"{name} by which images are normalized, where white is 1 (default: "
            f"ImageNet's, {' '.join(map(str, default))})",
        )
    group.add_argument(
        "--samples",
        type=whole,
        metavar="N",
        help="a random choice of so many, by class shares (default: all)",
    )


def _add_moments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=path, required=True, metavar="FILE", help="file to write"
    )
    for name, default, text in (
        ("group-size", 1, "samples whose mean gradient is squared as one"),
        ("draws", 1, "of sampled labels, for each sample"),
        ("batch-size", 64, "samples that run together; it changes no result"),
        ("seed", 0, "of the choice and order of samples, and of sampled labels"),
    ):
        text += " (default: %(default)s)"
        group.add_argument(
            f"--{name}", type=whole, default=default, metavar="N", help=text
        )
    group.add_argument(
        "--labels",
        choices=LABELS,
        default="given",
        help="of F: those of the data, for the empirical Fisher diagonal, or sampled "
        "from the model, for that of the Fisher information (default: %(default)s)",
    )
    group.add_argument(
        "--all-parameters",
        action="store_true",
        help="biases, normalization and the classifier too (default: the weights of "
        "Conv and Linear layers but the classifier)",
    )
    group.add_argument(
        "--max-accumulator-bytes",
        type=whole,
        metavar="N",
        help="of memory for the sums of a pass, 24 a weight and more for groups; what "
        "has no room is found in further passes (default: no limit)",
    )
    group.add_argument(
        "--offload",
        metavar="PLACE",
        help="keep sums in the CPU's memory, cpu, or in mapped files in a folder "
        "(default: on the device)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
