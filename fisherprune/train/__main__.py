"""``python -m fisherprune.train``: the command line."""

from __future__ import annotations

import errno
import io
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from fisherprune.commandline import prepare, run_command

if __name__ == "__main__":
    prepare()

import torch

from fisherprune.errors import FisherpruneError
from fisherprune.runs.result import RunResult
from fisherprune.runs.words import table
from fisherprune.statistics.ranks import RankError
from fisherprune.train import options, steps
from fisherprune.train.ranks import job_here


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    0 after a whole run, 2 for a mistake of the user's (one line on stderr), 130 after
    Ctrl-C.
    """
    job = job_here()
    if job is None or job.number == 0:
        return run_command("fisherprune.train", lambda: _command(argv))
    name = f"fisherprune.train: rank {job.number}"
    return run_command(name, lambda: _follow(argv))


def _follow(argv: Sequence[str] | None) -> int:
    """Be a rank behind the first: tell only what that one can't know."""
    try:
        with redirect_stdout(io.StringIO()):
            command = options.parse(argv)
    except FisherpruneError:  # which the first one has, too
        return 2
    warnings.simplefilter("ignore")
    try:
        _run(command)
    except RankError:
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


CPU_ALLOCATOR = "DefaultCPUAllocator"
"""What PyTorch's message names where the CPU's memory does not suffice."""


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or CPU_ALLOCATOR in str(error)


def _command(argv: Sequence[str] | None) -> int:
    print(table(_run(options.parse(argv))))
    return 0


def _run(command: options.Command) -> RunResult:
    try:
        return steps.run(command.config, folder=command.folder, quiet=command.quiet)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (f"{error}".splitlines() or ["out of memory"])[0]
        reason = reason.rpartition(f"{CPU_ALLOCATOR}: ")[2]
        hint = "a smaller --batch-size, --score-batch-size or --image-size needs less"
        raise FisherpruneError(f"{reason}; {hint} memory") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "make room, then --resume with the run's folder goes on"
        raise FisherpruneError(f"{error}; {hint}") from error


if __name__ == "__main__":
    sys.exit(main())
