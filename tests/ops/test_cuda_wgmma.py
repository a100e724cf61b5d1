"""The kernel of products of warpgroups, on a GPU that has them."""

import pytest
import taps_cases
import torch
from moment_cases import accumulators, make

from benchmarks.gpu.measure import NotHere
from benchmarks.gpu.wgmma import SWITCH, require
from fisherprune import ops
from fisherprune.ops import reference

CASES = taps_cases.WARPGROUPS
NETWORK = [
    (200, 64, 64, 32),
    (100, 128, 128, 16),
    (200, 256, 256, 8),
    (64, 512, 512, 4),
]


@pytest.fixture
def wgmma(monkeypatch, tf32):
    """Let the op choose the kernel, in TF32."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        require("cuda")
    except NotHere as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv(SWITCH, "1")
    tf32("tf32")


def moments(input, grad, weight, options):
    """Return sum and sum_sq of the op on the GPU, twice, and the truth."""
    pair = input.cuda(), grad.cuda()
    found = []
    for _ in range(2):
        found.append([a.cuda() for a in accumulators(weight)])
        ops.grad_moments(*pair, *found[-1], **options)
    truth = [a.double().cuda() for a in accumulators(weight)]
    reference.grad_moments(*pair, *truth, **options)
    return *found, truth


def check(case, bound):
    first, second, truth = moments(*case)
    assert all(map(torch.equal, first, second))
    for f, t in zip(first, truth, strict=True):
        assert (f - t).norm() <= bound * t.norm()


@pytest.mark.parametrize("name", CASES)
def test_moments(name, wgmma):
    check(make(**CASES[name]), 2e-3)


@pytest.mark.parametrize(("n", "c", "o", "size"), NETWORK)
def test_moments_of_network_layers(n, c, o, size, wgmma):
    shape = dict(size=(size, size), kernel=(3, 3), padding=(1, 1))
    check(make(n=n, c=c, o=o, **shape), 2e-3)


@pytest.mark.parametrize("group_size", [40, 200, 1000])
def test_groups_shared_by_blocks(group_size, wgmma):
    shape = dict(size=(8, 8), kernel=(3, 3), padding=(1, 1), group_size=group_size)
    check(make(n=300, c=64, o=64, **shape), 2e-3)


def test_copies_round_to_nearest(wgmma):
    """Where all terms have one sign, operands that are cut off lose 7e-4 of the sum."""
    shape = dict(size=(16, 16), kernel=(3, 3), padding=(1, 1))
    input, grad, *rest = make(n=32, c=64, o=128, **shape)
    check((input.abs(), grad.abs(), *rest), 1e-4)


def test_another_kernel_gives_nearly_the_same(wgmma, monkeypatch):
    """And not the same bits: the switch chooses another kernel."""
    input, grad, weight, options = make(**CASES["16_wide"])
    results = []
    for value in ("0", "1"):
        monkeypatch.setenv(SWITCH, value)
        results.append(moments(input, grad, weight, options)[0])
    for one, other in zip(*results, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() <= 1e-3 * one.norm()
