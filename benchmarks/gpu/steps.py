"""The steps of ``python -m benchmarks.gpu``; each runs in a process of its own.

So one that fails, hangs or is cut takes no other with it. The file is written after
every number, so that those found before remain::

    python -m benchmarks.gpu.steps NAME --output FILE [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu import checks, kernels, networks, profiles, wgmma
from benchmarks.gpu.measure import Found, NotHere, Row, limits
from benchmarks.record import program, usable_device, write_json
from fisherprune.commandline import Parser


@dataclass(frozen=True)
class Step:
    """A step: ``run(device)`` yields what it adds to the record."""

    name: str
    seconds: float
    """After which it is ended."""
    what: str
    run: Callable[[str], Iterable[Found]]


def ceilings(device: str) -> Iterator[Found]:
    """Measure what the device can do."""
    yield {"ceilings": limits(device)}


def rows(measure: Callable[[str], Iterable[Row]]) -> Callable[[str], Iterator[Found]]:
    """Return the numbers of ``measure`` as a step does."""
    return lambda device: ({"rows": [row]} for row in measure(device))


def passes(name: str, backend: str | None = None) -> Callable[[str], Iterator[Found]]:
    """Return the passes of a network as a step does."""
    return rows(partial(networks.passes, name=name, backend=backend))


_OVER = "gradient_moments over forward + backward, 4 and 32 batches"
_UNDER = "small cases of both ops under compute-sanitizer"
BUILD = Step("build", 20, "CUDA kernels of these sources; always first", checks.build)
DEFAULT = [
    Step("tests", 180, "pytest: kernels, passes and runs on CUDA", checks.tests),
    Step("ceilings", 25, "matmul in fp32, TF32 and bf16; memory copy, read", ceilings),
    Step("scoring", 45, "fts, 40,000 images, ResNet18", rows(networks.scoring)),
    Step("topk", 35, "11.2 M scores to masks; cat + topk", rows(kernels.selection)),
    Step("kernel", 40, "grad_moments over the TF32 matmul", rows(kernels.kernel)),
    Step("pass-resnet18", 40, _OVER, passes("resnet18")),
    Step("pass-vgg19", 40, _OVER, passes("vgg19")),
    Step("training", 70, "160 epochs of ResNet18, from 3", rows(networks.train)),
    Step("memory", 20, "peak memory of a pass, batch 512", rows(networks.memory)),
    Step("sequences", 20, "a transformer's layer in bf16", rows(kernels.sequences)),
]
"""What a call without ``--steps`` runs, the most telling first."""
SANITIZERS = [
    Step(tool, 125, _UNDER, partial(checks.sanitize, tool)) for tool in checks.TOOLS
]
OTHERS = [
    Step(
        "compiled-resnet18", 120, f"{_OVER}, compiled", passes("resnet18", "inductor")
    ),
    Step("compiled-vgg19", 120, f"{_OVER}, compiled", passes("vgg19", "inductor")),
    Step("profile", 45, "kernels of a pass, ours and plain", profiles.profile),
    Step("ncu", 150, "counters of grad_moments, the largest layers", profiles.ncu),
    Step("wgmma", 30, "kernel of warpgroup products, beside", rows(wgmma.compare)),
    Step("kernel-large", 30, "layers of 224 x 224 images", rows(kernels.large_images)),
    Step("topk-large", 25, "2^30 scores to masks", rows(kernels.large_selection)),
]
STEPS = {step.name: step for step in [BUILD, *DEFAULT, *OTHERS, *SANITIZERS]}
GROUPS = {"default": DEFAULT, "others": OTHERS, "sanitizers": SANITIZERS}


def add(record: Found, found: Found) -> None:
    """Add what a step found to a record: lists get longer, dicts get keys."""
    for key, value in found.items():
        if isinstance(value, list):
            record.setdefault(key, []).extend(value)
        else:
            record.setdefault(key, {}).update(value)


@program("benchmarks.gpu.steps")
def main(argv: Sequence[str] | None = None) -> None:
    """Run one step and write what it found, or why there is nothing to find."""
    parser = Parser("python -m benchmarks.gpu.steps", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", type=usable_device, default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    record: Found = {}
    try:
        for found in STEPS[options.step].run(options.device):
            add(record, found)
            write_json(options.output, record)
    except NotHere as reason:
        add(record, {"not_run": {options.step: str(reason)}})
        write_json(options.output, record)


if __name__ == "__main__":
    sys.exit(main())
