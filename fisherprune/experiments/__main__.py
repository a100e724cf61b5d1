"""The command line of ``python -m fisherprune.experiments``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from fisherprune.commandline import (
    Parser,
    number,
    path,
    prepare,
    reader,
    run_command,
    whole,
)

if __name__ == "__main__":
    prepare()

from fisherprune.errors import FisherpruneError
from fisherprune.experiments import store
from fisherprune.experiments.batch import Batch, listing
from fisherprune.experiments.execute import Options
from fisherprune.experiments.executors import Executor
from fisherprune.experiments.executors.local import Local
from fisherprune.experiments.executors.ray import Ray
from fisherprune.experiments.plan import Overrides, Plan
from fisherprune.experiments.shard import ALL, Shard
from fisherprune.runs import locks

DESCRIPTION = """\
Do the runs of studies: our own TOML files and the JSON files of the published FTS code.

Finished runs are skipped, interrupted ones go on with the last epoch done, failed ones
are tried again: after whatever happened, give the same command. Several processes of
one machine can work on the same study at the same time: each takes runs that no other
does. Machines that share a folder may not see each other's locks, on a network file
system above all: give machine I of N --shard I/N, or use --executor ray.

  python -m fisherprune.experiments run studies/smoke.toml
  python -m fisherprune.experiments status studies/smoke.toml
  python -m fisherprune.report results/smoke

Exit codes: 0 all runs are finished; 1 some failed or are left undone; 2 a mistake in
the files or the command, nothing was started, or a file that can't be read or written;
130 after Ctrl-C.
"""


def make_parser() -> Parser:
    """Build the parser of both commands."""
    parser = Parser("python -m fisherprune.experiments", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="do the runs")
    status = commands.add_parser("status", help="list the runs and their states")
    for command in (run, status):
        _add_common(command)
    _add_run(run)
    return parser


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        type=path,
        metavar="PATH",
        help="a .toml study, a .json file of the published code, or a folder of those",
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="results folder (default: results/NAME of a study, output_dir of a JSON "
        "file)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="for all runs: auto, cpu, cuda or cuda:INDEX"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of the data, for all runs"
    )
    parser.add_argument(
        "--processes",
        type=whole,
        metavar="N",
        help="for all runs: processes that share each batch of a run; on GPUs each has "
        "one. Runs of other numbers of processes are other runs",
    )
    parser.add_argument(
        "--shard",
        type=reader(Shard.read),
        default=ALL,
        metavar="I/N",
        help="only the runs of part I of N, I from 1 to N; for machines or jobs that "
        "do not talk to each other. Each run is in one part, whatever else is given",
    )


def _add_run(parser: Parser) -> None:
    parser.description = (
        "Do the runs of PATHs in their order. Folders are looked into again after\n"
        "each run: files put there meanwhile join."
    )
    parser.add_argument(
        "--max-minutes",
        type=_positive,
        default=math.inf,
        metavar="N",
        help="start no run that would not end within N minutes from now, going by "
        "finished runs of the same model, data and epochs",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where runs are done: one after the other here (default), or on a Ray "
        "cluster, that of RAY_ADDRESS or one started here",
    )
    parser.add_argument(
        "--gpus-per-run",
        type=_fraction,
        metavar="X",
        help="GPUs of each run on Ray, a fraction or as many as it has processes "
        "(default: one for each process where there are any)",
    )
    parser.add_argument(
        "--cpus-per-run",
        type=_positive,
        metavar="X",
        help="CPUs of each run on Ray (default: one for each process)",
    )
    parser.add_argument(
        "--keep-weights",
        action="store_true",
        help="keep the trained weights of the runs, not only masks and results",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="a line for each run, none for its epochs"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs and their states, do none"
    )


def _positive(text: str) -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _fraction(text: str) -> float:
    value = number(text)
    if value < 0 or (value > 1 and value != int(value)) or not math.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"must be a fraction in [0, 1] or a whole number, got {text}"
        )
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command("fisherprune.experiments", lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    options = make_parser().parse_args(argv)
    given = options.output, options.device, options.data_dir, options.processes
    overrides = Overrides(*given)
    plan = Plan(options.paths, overrides, options.shard)
    if options.command == "status" or options.dry_run:
        print(listing(plan))
        return 0
    batch = Batch(plan, _executor(plan, options), max_minutes=options.max_minutes)
    code = batch.run()
    print(batch.summary())
    return code


def _executor(plan: Plan, options: argparse.Namespace) -> Executor:
    """Return where runs are done, after the results folders are known to work."""
    given = options.gpus_per_run is not None or options.cpus_per_run is not None
    if given and options.executor != "ray":
        raise FisherpruneError(
            "--gpus-per-run and --cpus-per-run are for --executor ray alone"
        )
    alone = options.executor == "local" and plan.shard == ALL
    for results in {run.results for run in plan.runs}:
        store.make_folder(results)
        if alone:
            locks.check(results / "locks")
    how = Options(options.keep_weights, options.quiet, needs_lock=alone)
    if options.executor == "local":
        return Local(how)
    _check_gpus(plan, options.gpus_per_run)
    return Ray(how, options.gpus_per_run, options.cpus_per_run)


def _check_gpus(plan: Plan, gpus: float | None) -> None:
    """Raise FisherpruneError where a run has not as many GPUs as processes."""
    for run in plan.runs:
        count = run.config.processes
        if gpus and max(gpus, 1) != count:
            most = "at most " if count == 1 else ""
            raise FisherpruneError(
                f"--gpus-per-run must be {most}{count} for a run of {count} processes, "
                f"each of which uses one, got {gpus:g}; --processes N sets their number"
            )


if __name__ == "__main__":
    sys.exit(main())
