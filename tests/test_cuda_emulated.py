"""The CUDA kernels' own source, run on the CPU by tests/emulator, against the twins."""

import subprocess

import numpy as np
import pytest
import torch
from emulator import drive
from moment_cases import CASES, accumulators, make
from topk_cases import VALUES, case

from fisherprune import reference

pytestmark = pytest.mark.skipif(
    drive.COMPILER is None, reason="the emulator of CUDA kernels needs g++"
)

# ---- the emulator notices what it is there for ----


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("barrier", "right"),
        ("no_barrier", "wrong"),
        ("wait", "right"),
        ("no_wait", "wrong"),
        ("within_shared", "right"),
        ("past_shared", "heap-buffer-overflow"),
        ("past_global", "heap-buffer-overflow"),
        ("lonely_barrier", "threads wait for others in vain"),
        ("diverged", "lanes of a warp meet in different operations"),
        ("copies_left", "a thread ends with copies under way"),
    ],
)
def test_emulator_notices(kernel, says):
    done = subprocess.run(
        [drive.build("planted"), kernel], capture_output=True, text=True, check=False
    )
    assert says in done.stdout + done.stderr
    assert (done.returncode == 0) == (says in ("right", "wrong"))


# ---- grad_moments ----


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
        options = {
            k: arguments.pop(k)
            for k in ("allow_tf32", "tile", "multiprocessors", "seed")
            if k in arguments
        }
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


def check_all(named, folder, bound):
    pairs = moments([c for _, c in named], folder)
    for (name, _), (results, truths) in zip(named, pairs, strict=True):
        assert max(distances(results, truths)) <= bound, name


def test_moments_of_every_case(tmp_path):
    named = [(name, make(**case)) for name, case in CASES.items()]
    check_all(named, tmp_path, 1e-5)


# ---- global_topk ----


def topk(cases, folder, **options):
    """Run (scores, keep) cases, yield each one's masks, thresholds and nonfinite."""
    encoded = [drive.topk_case(*c, **options) for c in cases]
    arrays = iter(drive.run(encoded, folder))
    for scores, keep in cases:
        thresholds = np.frombuffer(next(arrays), np.float32)
        nonfinite = np.frombuffer(next(arrays), np.int64)
        masks = [
            [np.frombuffer(next(arrays), bool).reshape(s.shape) for s in scores]
            for _ in keep
        ]
        yield masks, thresholds, nonfinite


def check_topk(cases, folder, **options):
    for (scores, keep), (masks, thresholds, nonfinite) in zip(
        cases, topk(cases, folder, **options), strict=True
    ):
        tensors = [torch.from_numpy(s) for s in scores]
        expected, levels = reference.global_topk(tensors, keep)
        assert not nonfinite.any()
        np.testing.assert_array_equal(thresholds, levels.numpy())
        for got, want in zip(masks, expected, strict=True):
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(g, w.numpy())


def test_topk_of_every_case(tmp_path):
    cases = []
    for name in VALUES:
        scores, keep = case(name, 3000)
        cases.append((scores, keep[:6]))
    check_topk(cases, tmp_path)
