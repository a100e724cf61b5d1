"""What the tests of grad_moments share: how it is called and compared with float64."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from moment_cases import accumulators

from fisherprune import ops
from fisherprune.ops import reference

ROOT = Path(__file__).parents[2]


def moments(op, input, grad, weight, options, dtype=torch.float32):
    """Return sum and sum_sq after ``op``, from accumulators that are not empty."""
    sum, sum_sq = (x.to(dtype) for x in accumulators(weight))
    op(input, grad, sum, sum_sq, **options)
    return sum, sum_sq


def error(result, truth):
    """Return the norm-wise relative error."""
    if truth.numel() == 0:
        return 0.0
    return ((result.double() - truth).norm() / truth.norm()).item()


def assert_right(input, grad, weight, options):
    got = moments(ops.grad_moments, input, grad, weight, options)
    truth = moments(reference.grad_moments, input, grad, weight, options, torch.float64)
    assert error(got[0], truth[0]) <= 1e-5
    assert error(got[1], truth[1]) <= 1e-5


def run_python(script, **environment):
    folders = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "ops"]
    path = os.pathsep.join(map(str, folders))
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def negated(x):
    """Return a view of the same values that torch negates when it is read."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view
