"""``python -m benchmarks``: every benchmark, one after the other, then the targets.

Each is a process of its own, so that none finds the memory as another left it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks import targets


def main() -> None:
    """Run all and print the targets; the result files go to benchmarks/results/."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="samples per competitor")
    parser.add_argument("--plot", action="store_true", help="draw PNGs as well")
    options = parser.parse_args()
    arguments = ["--rounds", str(options.rounds)] + ["--plot"] * options.plot
    for name in ("topk", "moments", "end_to_end", "curvature", "training"):
        print(f"\n# benchmarks.{name}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        if status := subprocess.run(command, check=False).returncode:
            raise SystemExit(status)
    print("\n# targets\n")
    targets.main()


if __name__ == "__main__":
    main()
