"""Cycles that shared memory takes for the layers of ResNets, in the emulator.

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
# The same for images of 224 x 224.
LARGE_LAYERS = {
    "64@56": (56, 1, 64, 16),
    "128@28": (28, 1, 128, 16),
    "256@14": (14, 2, 128, 16),
    "512@7": (7, 4, 128, 16),
}
PRODUCTS = 128 * 128 * 32


def counts_of_layers(
    layers,
    folder: Path,
    kind: str = "taps",
    dtype=torch.float32,
    channels_last: bool = False,
):
    """Return [cycles, bytes] of each layer's tile: of taps, window, wgmma or lanes.

    The tiles of warpgroups are those of a cluster.
    """
    cases, products = [], []
    for width, n, outputs, channels in layers.values():
        if kind == "wgmma":
            channels = 64  # full tiles of warpgroups, in clusters
        if kind == "window":
            channels = 128  # 1152 weights are nine of its tiles
        tile = kind if outputs == 128 else f"slim_{kind}"
        shape = dict(size=(width, width), kernel=(3, 3), padding=(1, 1), dtype=dtype)
        input, grad, weight, options = make(n=n, c=channels, o=outputs, **shape)
        if channels_last:
            input, grad = (
                x.contiguous(memory_format=torch.channels_last) for x in (input, grad)
            )
        sums = [torch.zeros(weight) for _ in range(2)]
        options |= {"allow_tf32": True, "tile": tile, "multiprocessors": 1}
        cases.append(drive.cycles_case(input, grad, *sums, **options))
        products.append(weight.numel() * n * width * width)
    results = drive.run(cases, folder)[2::3]
    counts = [np.frombuffer(each, np.int64) for each in results]
    return [c * PRODUCTS / n for c, n in zip(counts, products, strict=True)]


KERNELS = (
    ("window", LAYERS, "window"),
    ("taps", LAYERS, "taps"),
    ("taps, 16 bits", LAYERS, "taps", torch.bfloat16),
    ("wgmma", LAYERS, "wgmma"),
    ("lanes", LARGE_LAYERS, "lanes"),
    ("lanes, channels_last", LARGE_LAYERS, "lanes", torch.float32, True),
    ("lanes, 16 bits, channels_last", LARGE_LAYERS, "lanes", torch.bfloat16, True),
    ("lanes, channels_last", LAYERS, "lanes", torch.float32, True),
)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name, layers, *how in KERNELS:
            counts = counts_of_layers(layers, Path(place), *how)
            words = [
                f"{at} {cycles:.0f}" + f" ({read:.0f} bytes)" * bool(read)
                for at, (cycles, read) in zip(layers, counts, strict=True)
            ]
            sys.stdout.write(f"{name}: {', '.join(words)}\n")
