"""Cycles that shared memory takes for a stage of the window kernels, in the emulator.

``python tests/support/shared_cycles.py`` prints them for the layers of a ResNet18.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from emulator import drive
from moment_cases import make

# The tile, the images' width, samples; two blocks of slim tiles make 128 x 128 outputs.
LAYERS = {
    "64@32": ("slim_window", 32, 1),
    "128@16": ("window", 16, 2),
    "256@8": ("window", 8, 4),
    "512@4": ("window", 4, 16),
}
STAGE = 32  # positions


def cycles_of_stages(names, folder: Path, dtype=torch.float32) -> list[float]:
    """Return the cycles for 128 x 128 outputs and 32 positions, layer by layer."""
    cases, stages = [], []
    for name in names:
        tile, width, n = LAYERS[name]
        size, blocks = (width, width), 1 if tile == "window" else 2
        shape = dict(size=size, kernel=(3, 3), padding=(1, 1), dtype=dtype)
        # 1152 columns are nine tiles of weights that all exist.
        input, grad, weight, options = make(n=n, c=128, o=128 // blocks, **shape)
        sums = [torch.zeros(weight) for _ in range(2)]
        options |= {"allow_tf32": True, "tile": tile, "multiprocessors": 1}
        cases.append(drive.cycles_case(input, grad, *sums, **options))
        stages.append(n * width * width // STAGE * weight[1:].numel() / 128 / blocks)
    results = drive.run(cases, folder)[2::3]
    counts = [int(np.frombuffer(each, np.int64)[0]) for each in results]
    return [count / n for count, n in zip(counts, stages, strict=True)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for cycles, layer in zip(
            cycles_of_stages(LAYERS, Path(place)), LAYERS, strict=True
        ):
            sys.stdout.write(f"{layer}: {cycles:.0f} cycles a stage\n")
