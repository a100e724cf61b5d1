"""``python -m benchmarks``: every benchmark of one device, one after the other."""

from __future__ import annotations

import sys

from benchmarks import end_to_end, moments, topk

if __name__ == "__main__":
    for benchmark in (moments, topk, end_to_end):
        print(f"\n# {benchmark.__name__}\n")
        benchmark.main(sys.argv[1:])
