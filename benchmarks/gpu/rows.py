"""The numbers a GPU must reach, a step at a time: verified first, then timed.

``python -m benchmarks.gpu`` runs each step in a process of its own, so that one that
fails or hangs takes no other with it. The file is written after every number, so that
those found before a failure remain::

    python -m benchmarks.gpu.rows STEP --output FILE [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu import networks as gpu_networks
from benchmarks.gpu.measure import NotHere, limits
from benchmarks.record import write_json

STEPS: dict[str, Callable[[str], Iterable[dict]]] = {
    "scoring": gpu_networks.scoring,
    "pass-resnet18": partial(gpu_networks.passes, name="resnet18"),
    "pass-vgg19": partial(gpu_networks.passes, name="vgg19"),
    "kernel": gpu_kernels.kernel,
    "sequences": gpu_kernels.sequences,
    "topk": gpu_kernels.selection,
    "topk-large": gpu_kernels.large_selection,
    "memory": gpu_networks.memory,
}


def results_of(step: str, device: str) -> Iterator[dict[str, Any]]:
    """Run one step; yield all that is found so far whenever that is more.

    Where the machine lacks what it needs, that is why nothing is.
    """
    rows = []
    try:
        if step == "ceilings":
            yield {"ceilings": limits(device)}
            return
        for row in STEPS[step](device):
            rows.append(row)
            yield {"rows": rows}
    except NotHere as reason:
        yield {"not_run": str(reason)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one step and write what it found."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.rows")
    parser.add_argument("step", choices=["ceilings", *STEPS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    for found in results_of(options.step, options.device):
        write_json(options.output, found)


if __name__ == "__main__":
    main()
