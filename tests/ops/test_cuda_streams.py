"""Where the ops run on a GPU, and when: devices, streams, graphs, used memory."""

import pytest
import torch
from gpus import CYCLES, DEVICES, needs_gpu
from moment_cases import CASES, make
from moment_checks import error
from topk_cases import case as topk_case
from window_cases import CASES as WINDOW_CASES

from fisherprune import ops
from fisherprune.ops import reference

ALL_CASES = {**CASES, **WINDOW_CASES}


def operands(name, device="cuda"):
    """Return the operands of a case of grad_moments there, zeros, and its options."""
    input, grad, weight, options = make(**ALL_CASES[name])
    sums = [torch.zeros(weight, device=device) for _ in range(2)]
    return input.to(device), grad.to(device), sums, options


def moments(input, grad, sums, options):
    """Return what the op adds to zeros."""
    for each in sums:
        each.zero_()
    ops.grad_moments(input, grad, *sums, **options)
    return [each.clone() for each in sums]


@needs_gpu
def test_ops_run_in_a_captured_graph():
    input, grad, sums, options = operands("many_samples")
    keep = [sums[0].numel() // 10]

    def step():
        ops.grad_moments(input, grad, *sums, **options)
        return torch.ops.fisherprune.global_topk(sums, keep, keep)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for s in sums:
        s.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks, thresholds, _ = step()
    graph.replay()
    captured = [x.clone() for x in (*sums, *masks, thresholds)]
    for s in sums:
        s.zero_()
    masks, thresholds, _ = step()
    assert all(map(torch.equal, captured, (*sums, *masks, thresholds)))


@needs_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", ["many_samples", "8_wide", "linear_large"])
def test_moments_run_on_the_current_stream(name, precision, tf32):
    """Their operands come late, by the same stream."""
    tf32(precision)
    input, grad, sums, options = operands(name)
    expected = moments(input, grad, sums, options)
    late, side = [torch.zeros_like(x) for x in (input, grad)], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for there, x in zip(late, (input, grad), strict=True):
            there.copy_(x)
        found = moments(*late, sums, options)
    side.synchronize()
    assert all(map(torch.equal, found, expected))


@needs_gpu
def test_topk_runs_on_the_current_stream():
    arrays, keep = topk_case("gaussian", 20_000)
    scores = [torch.from_numpy(each) for each in arrays]
    late, side = [s.cuda().zero_() for s in scores], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for there, each in zip(late, scores, strict=True):
            there.copy_(each)
        masks, thresholds = ops.global_topk(late, keep)
    side.synchronize()
    assert_selected((masks, thresholds), scores, keep)


def assert_selected(found, scores, keep):
    masks, thresholds = reference.global_topk(scores, keep)
    assert torch.equal(found[1].cpu(), thresholds)
    for got, want in zip(found[0], masks, strict=True):
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_ops_run_on_the_device_of_their_tensors(device):
    """Whichever is the current one."""
    for name in ("plain_3x3", "8_wide", "linear_wide"):
        input, grad, sums, options = operands(name, device)
        truth = [torch.zeros_like(each.cpu(), dtype=torch.float64) for each in sums]
        reference.grad_moments(input.cpu(), grad.cpu(), *truth, **options)
        found = moments(input, grad, sums, options)
        assert max(error(f.cpu(), t) for f, t in zip(found, truth, strict=True)) < 2e-3
    arrays, keep = topk_case("gaussian", 20_000)
    scores = [torch.from_numpy(each) for each in arrays]
    found = ops.global_topk([each.to(device) for each in scores], keep)
    assert_selected(found, scores, keep)


def poison(device):
    """Fill memory that is then free with NaN: who asks next gets it."""
    sizes = range(7, 26 if device == "cuda" else 20)
    blocks = [
        torch.full((2**k,), torch.nan, device=device) for k in sizes for _ in "four"
    ]
    del blocks


@pytest.mark.parametrize("device", DEVICES[:2])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_moments_read_nothing_that_they_did_not_write(name, precision, device, tf32):
    tf32(precision)
    case = operands(name, device)
    expected = moments(*case)
    poison(device)
    found = moments(*case)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("device", DEVICES[:2])
@pytest.mark.parametrize("name", ["gaussian", "few_distinct"])
def test_topk_reads_nothing_that_it_did_not_write(name, device):
    arrays, keep = topk_case(name, 300_000)
    scores = [torch.from_numpy(each) for each in arrays]
    there = [each.to(device) for each in scores]
    poison(device)
    assert_selected(ops.global_topk(there, keep), scores, keep)
