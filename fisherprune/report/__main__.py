"""``python -m fisherprune.report RESULTS... [--output DIR] [--quiet]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fisherprune.commandline import Parser, path, prepare, run_command

if __name__ == "__main__":
    prepare()

from fisherprune.report.pages.render import terminal
from fisherprune.report.printable import one_line
from fisherprune.report.write import write_report

DESCRIPTION = """\
Tables and figures of the runs in and below results folders.

Writes report.html (one page that needs nothing else), report.md, report.csv (a row for
each run), summary.csv (a row for each cell) and pairs.csv (a row for each two methods
with three seeds in common), and prints the tables. Exit code: 0, or 1 where files were
broken (the rest is reported), or 2 where there is no report.
"""


def make_parser() -> Parser:
    """Return the command line."""
    parser = Parser("python -m fisherprune.report", description=DESCRIPTION)
    parser.add_argument(
        "results",
        nargs="+",
        type=path,
        metavar="RESULTS",
        help="results folder, folder with runs anywhere below it, or a run's folder",
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="folder to write to (default: RESULTS/report)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, only the tables"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command("fisherprune.report", lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    options = make_parser().parse_args(argv)
    say = _silent if options.quiet else _progress
    report, folder = write_report(options.results, options.output, say=say)
    print(terminal(report))
    print(f"written to {one_line(folder)}")
    for problem in report.found.problems:
        print(f"fisherprune.report: broken: {problem}", file=sys.stderr)
    return 1 if report.found.problems else 0


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
