"""Cycles that shared memory takes for the layers of a ResNet18, in the emulator.

``PYTHONPATH=tests/support python tests/support/shared_cycles.py`` prints them for
128 x 128 outputs and 32 positions, for which tensor cores take 512 cycles of TF32 at
their peak, and some 813 as far as ``mma.sync`` reaches it on an H200. For products of
warpgroups it prints the bytes, too, that a multiprocessor gets from the second-level
cache, which gives it some 28 in a cycle: with four blocks in a cluster, or with two.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from emulator import drive
from moment_cases import make

# The images' width, samples, outputs, channels whose weights fill tiles.
LAYERS = {
    "64@32": (32, 1, 64, 16),
    "128@16": (16, 2, 128, 16),
    "256@8": (8, 4, 128, 16),
    "512@4": (4, 16, 128, 16),
}
PRODUCTS = 128 * 128 * 32


def counts_of_layers(names, folder: Path, kind: str = "taps", dtype=torch.float32):
    """Return [cycles, bytes] of each layer's tile, by "taps", "window" or "wgmma".

    The tiles of warpgroups are those of a cluster.
    """
    cases, products = [], []
    for name in names:
        width, n, outputs, channels = LAYERS[name]
        if kind != "taps":
            channels = 64  # full tiles of warpgroups, in clusters
        if kind == "window":
            channels = 128  # 1152 weights are nine of its tiles
        tile = kind if outputs == 128 else f"slim_{kind}"
        shape = dict(size=(width, width), kernel=(3, 3), padding=(1, 1), dtype=dtype)
        input, grad, weight, options = make(n=n, c=channels, o=outputs, **shape)
        sums = [torch.zeros(weight) for _ in range(2)]
        options |= {"allow_tf32": True, "tile": tile, "multiprocessors": 1}
        cases.append(drive.cycles_case(input, grad, *sums, **options))
        products.append(weight.numel() * n * width * width)
    results = drive.run(cases, folder)[2::3]
    counts = [np.frombuffer(each, np.int64) for each in results]
    return [c * PRODUCTS / n for c, n in zip(counts, products, strict=True)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for kind, dtype in [
            ("window", torch.float32),
            ("taps", torch.float32),
            ("taps", torch.bfloat16),
            ("wgmma", torch.float32),
        ]:
            counts = counts_of_layers(LAYERS, Path(place), kind, dtype)
            words = [
                f"{name} {cycles:.0f}" + f" ({read:.0f} bytes)" * bool(read)
                for name, (cycles, read) in zip(LAYERS, counts, strict=True)
            ]
            sys.stdout.write(f"{kind} {str(dtype)[6:]}: {', '.join(words)}\n")
