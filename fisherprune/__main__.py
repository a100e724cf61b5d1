"""``fisherprune COMMAND``: one program for all commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fisherprune import __version__
from fisherprune.commandline import Parser, prepare, run_command

DESCRIPTION = """\
Exact pruning at initialization for PyTorch.

  fisherprune train --dataset digits --model resnet20 --epochs 10
  fisherprune COMMAND --help
"""
COMMANDS = {
    "train": ("fisherprune.train.__main__", "prune a network and train what is left"),
    "check": ("fisherprune.train.check", "say how a network's gradients are found"),
    "fisher": ("fisherprune.fisher.__main__", "write the gradient moments of a model"),
    "experiments": ("fisherprune.experiments.__main__", "do the runs of studies"),
    "report": ("fisherprune.report.__main__", "tables and figures of the runs"),
    "doctor": ("fisherprune.doctor", "what is installed, and what is wrong with it"),
}
"""The commands: the module of each, imported when it is chosen, and its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in COMMANDS:
        module, _ = COMMANDS[arguments[0]]
        return import_module(module).main(arguments[1:])
    return run_command("fisherprune", lambda: _no_command(arguments))


def _no_command(arguments: list[str]) -> int:
    """Print what was asked for, or raise for what is no command."""
    parser = Parser("fisherprune", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, help) in COMMANDS.items():
        commands.add_parser(name, help=help)
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
