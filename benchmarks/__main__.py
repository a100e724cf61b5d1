"""``python -m benchmarks``: every benchmark, one after the other, then the targets."""

from __future__ import annotations

import argparse

from benchmarks import end_to_end, moments, targets, topk, training


def main() -> None:
    """Run all and print the targets; the result files go to benchmarks/results/."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="samples per competitor")
    parser.add_argument("--plot", action="store_true", help="draw PNGs as well")
    options = parser.parse_args()
    arguments = ["--rounds", str(options.rounds)] + ["--plot"] * options.plot
    for benchmark in (topk, moments, end_to_end, training):
        print(f"\n# {benchmark.__name__}\n")
        benchmark.main(arguments)
    print("\n# targets\n")
    targets.main()


if __name__ == "__main__":
    main()
