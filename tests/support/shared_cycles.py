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
# 1 x 1 convolutions, with their stride.
POINTWISE = {
    "1024@14/2": (14, 2, 128, 128, 1, 2),
    "256@56/2": (56, 1, 128, 128, 1, 2),
    "256@56": (56, 1, 128, 128, 1, 1),
    "512@7": (7, 4, 128, 128, 1, 1),
}
STRIDED = {
    "128@56/2": (56, 1, 128, 16, 3, 2),
    "256@28/2": (28, 1, 128, 16, 3, 2),
    "512@14/2": (14, 4, 128, 16, 3, 2),
}
PRODUCTS = 128 * 128 * 32


def counts_of_layers(
    layers,
    folder: Path,
    kind: str = "taps",
    dtype=torch.float32,
    channels_last: bool = False,
):
    """Return [cycles, bytes] of each layer's tile.

    Of taps, window, wgmma, lanes or dense; tiles of warpgroups are those of a cluster.
    """
    cases, products = [], []
    for width, n, outputs, channels, *window in layers.values():
        kernel, stride = window or (3, 1)
        if kind == "wgmma":
            channels = 64  # full tiles of warpgroups, in clusters
        if kind == "window":
            channels = 128  # 1152 weights are nine of its tiles
        tile = kind if outputs == 128 else f"slim_{kind}"
        shape = dict(kernel=(kernel,) * 2, padding=(kernel // 2,) * 2, dtype=dtype)
        shape |= dict(size=(width, width), stride=(stride,) * 2)
        input, grad, weight, options = make(n=n, c=channels, o=outputs, **shape)
        if channels_last:
            input, grad = (
                x.contiguous(memory_format=torch.channels_last) for x in (input, grad)
            )
        sums = [torch.zeros(weight) for _ in range(2)]
        options |= {"allow_tf32": True, "tile": tile, "multiprocessors": 1}
        cases.append(drive.cycles_case(input, grad, *sums, **options))
        products.append(weight.numel() * n * grad[0, 0].numel())
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
    ("lanes, 16 bits, channels_last", STRIDED, "lanes", torch.bfloat16, True),
    ("dense", POINTWISE, "dense"),
    ("dense, channels_last", POINTWISE, "dense", torch.float32, True),
    ("dense, 16 bits, channels_last", POINTWISE, "dense", torch.bfloat16, True),
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
