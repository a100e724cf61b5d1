"""What the tests of emulated kernels share: grad_moments in the emulator, and truth."""

import numpy as np
import torch
from emulator import drive
from moment_cases import CASES, accumulators, make

from fisherprune.ops import reference

OPTIONS = ("allow_tf32", "tile", "copies", "multiprocessors", "seed", "shift")


def as_images(input, grad, weight):
    """Give linear layers the shapes that `ops.grad_moments` gives them."""
    if len(weight) == 4:
        return input, grad, weight
    flat = [
        x.reshape(len(x), x.shape[1:-1].numel(), x.shape[-1]).mT.unsqueeze(-1)
        for x in (input, grad)
    ]
    return *flat, torch.Size((*weight, 1, 1))


def moments(cases, folder):
    """Run (input, grad, weight, arguments) cases, yield each one's result and truth."""
    encoded, truths = [], []
    for input, grad, weight, arguments in cases:
        input, grad, weight = as_images(input, grad, weight)
        options = {k: arguments.pop(k) for k in OPTIONS if k in arguments}
        start = accumulators(weight)
        encoded.append(drive.moments_case(input, grad, *start, **arguments, **options))
        truth = [a.double() for a in start]
        reference.grad_moments(input, grad, *truth, **arguments)
        truths.append(truth)
    arrays = drive.run(encoded, folder)
    results = [torch.from_numpy(np.frombuffer(a, np.float32).copy()) for a in arrays]
    for i, truth in enumerate(truths):
        pair = results[2 * i : 2 * i + 2]
        yield [r.view(t.shape) for r, t in zip(pair, truth, strict=True)], truth


def distances(results, truths):
    """Return the relative errors, norm-wise, of sum and of sum_sq."""
    return [
        ((r - t).norm() / t.norm()).item() if t.numel() else 0.0
        for r, t in zip(results, truths, strict=True)
    ]


def check_all(named, folder, bound=1e-5):
    pairs = moments([c for _, c in named], folder)
    for (name, _), (results, truths) in zip(named, pairs, strict=True):
        assert max(distances(results, truths)) <= bound, name


def small(name):
    """Make a named case, of few enough samples and positions for an emulator."""
    shape = dict(CASES[name])
    if "size" in shape:
        shape["size"] = tuple(min(size, 20) for size in shape["size"])
    return make(**shape | {"n": min(shape["n"], 11)})


def as_tf32(x):
    """Round to the eleven bits that the tensor cores take, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
