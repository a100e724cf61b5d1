"""``python -m benchmarks``: every benchmark, one after the other, then the targets.

Each is a process of its own, so that none finds the memory as another left it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import targets
from benchmarks.record import add_rounds, program
from fisherprune.commandline import Parser

NAMES = (
    *("topk", "moments", "end_to_end", "curvature", "zoo", "rounds", "training"),
    *("processes", "sparse"),
)


@program("benchmarks")
def main(argv: Sequence[str] | None = None) -> int:
    """Run all and print the targets; the result files go to benchmarks/results/."""
    parser = Parser("python -m benchmarks", description=__doc__)
    add_rounds(parser)
    parser.add_argument("--plot", action="store_true", help="draw PNGs as well")
    options = parser.parse_args(argv)
    arguments = ["--rounds", str(options.rounds)] + ["--plot"] * options.plot
    for name in NAMES:
        print(f"\n# benchmarks.{name}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        if status := subprocess.run(command, check=False).returncode:
            return status
    print("\n# targets\n")
    return targets.main([])


if __name__ == "__main__":
    sys.exit(main())
