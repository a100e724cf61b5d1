"""Operands of grad_moments as they lie in memory, and what memory it takes."""

import itertools

import pytest
import torch
from moment_cases import CASES, LAYOUTS, make
from moment_checks import assert_right, error, moments, negated, run_python

from fisherprune import ops

CONV = CASES["stride_2"]

WIDE = CASES["wide_3x3"]

DEPTHWISE = CASES["depthwise"]


@pytest.mark.parametrize(
    "case",
    [
        CONV,
        DEPTHWISE,
        WIDE,
        CASES["pointwise_stride_2"],
        CASES["pointwise_wide_stride_2"],
        CASES["depthwise_3x3_stride_2"],
        CASES["grouped_by_8_stride_2"],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x + 1], -1)[..., 0],
        lambda x: torch.cat([x, x, x])[1::2],
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:, :, :1, :1].expand_as(x),
        lambda x: x[:1].expand_as(x),
    ],
    ids="channels_last columns gaps samples channel position sample".split(),
)
def test_strides_and_dtypes(case, dtype, strided):
    input, grad, weight, options = make(**case, dtype=dtype)
    input, grad = strided(input), strided(grad)
    n = min(len(input), len(grad))
    assert_right(input[:n], grad[:n], weight, options)


def test_mixed_dtypes():
    input, grad, weight, options = make(**CONV)
    assert_right(input.half(), grad.bfloat16(), weight, options)
    assert_right(input, grad.half(), weight, options)


def test_overlapping_input():
    _, grad, weight, options = make(**CASES["plain_3x3"])
    input = torch.randn(40).as_strided((3, 4, 6, 5), (5, 1, 2, 3))
    assert_right(input, grad, weight, options)


def test_every_float16_converts_exactly():
    """Subnormals, zeros of both signs and infinities come through; NaN stays NaN."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)[None]
        sum, sum_sq = torch.zeros(1, 2**16), torch.zeros(1, 2**16)
        ops.grad_moments(values, torch.ones(1, 1), sum, sum_sq)
        torch.testing.assert_close(sum, values.float(), rtol=0, atol=0, equal_nan=True)


def tap_by_tap(input, grad, sum, sum_sq, stride, padding, dilation, groups, group_size):
    """Add the moments in loops over taps and positions, in what memory there is."""
    rows, columns = grad.shape[2:]
    weight = sum.shape
    gradient = torch.zeros(len(input), *weight, dtype=sum.dtype)
    images = input.to(sum.dtype).unflatten(1, (groups, -1))
    grads = grad.to(sum.dtype).unflatten(1, (groups, -1))
    taps = [range(k) for k in weight[2:]]
    for y, x, p, q in itertools.product(*taps, range(rows), range(columns)):
        h = p * stride[0] - padding[0] + y * dilation[0]
        w = q * stride[1] - padding[1] + x * dilation[1]
        if 0 <= h < input.shape[2] and 0 <= w < input.shape[3]:
            pair = grads[..., p, q], images[..., h, w]
            product = torch.einsum("ngo,ngc->ngoc", *pair).flatten(1, 2)
            gradient[..., y, x] += product
    for group in gradient.split(group_size):
        sum += group.mean(0)
        sum_sq += group.mean(0).square()


@pytest.mark.parametrize(
    "geometry",
    [
        dict(stride=(1, 1), padding=(10**5, 10**5), dilation=(10**5, 10**5)),
        dict(stride=(10**6, 2), padding=(10**6, 3), dilation=(7, 2)),
        dict(stride=(1, 2**58), padding=(0, 2**57), dilation=(1, 2**57)),
        dict(stride=(2**62, 1), padding=(1, 9), dilation=(3, 9)),
    ],
)
@pytest.mark.parametrize("strided", [lambda x: x, LAYOUTS["channels_last"]])
def test_padding_much_larger_than_the_image(geometry, strided):
    """Nothing of that size is allocated; taps that meet no image have no moments."""
    size, kernel = (6, 5), (3, 3)
    out = [
        (size[i] + 2 * geometry["padding"][i] - 2 * geometry["dilation"][i] - 1)
        // geometry["stride"][i]
        + 1
        for i in range(2)
    ]
    options = geometry | dict(groups=4, group_size=2)
    input = strided(torch.randn(5, 40, *size))
    grad = strided(torch.randn(5, 8, *out))
    weight = torch.Size((8, 10, *kernel))
    got = moments(ops.grad_moments, input, grad, weight, options)
    truth = moments(tap_by_tap, input, grad, weight, options, torch.float64)
    assert max(map(error, got, truth)) <= 1e-5


def test_kernel_of_one_row_has_any_dilation():
    input, grad, weight, options = make(n=2, c=3, o=4, size=(5, 5), kernel=(1, 3))
    got = [
        moments(ops.grad_moments, input, grad, weight, options | dict(dilation=(d, 1)))
        for d in (1, 2**62)
    ]
    assert all(map(torch.equal, *got))


def test_lazily_negated_operands_are_read_right():
    input, grad, weight, options = make(**CONV)
    got = moments(ops.grad_moments, negated(input), negated(grad), weight, options)
    same = moments(ops.grad_moments, input, grad, weight, options)
    assert all(map(torch.equal, got, same))


def test_inputs_are_left_alone():
    input, grad, weight, options = make(**CASES["linear_wide"])
    before = input.clone(), grad.clone()
    moments(ops.grad_moments, input, grad, weight, options)
    assert torch.equal(input, before[0])
    assert torch.equal(grad, before[1])


MEMORY = """
import torch
from pathlib import Path
from fisherprune import ops

def most():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

input, grad = torch.randn(256, 512, 2, 2), torch.randn(256, 512, 2, 2)
sum, sum_sq = torch.zeros(2, 512, 512, 3, 3)
ops.grad_moments(input[:1], grad[:1], sum, sum_sq, padding=(1, 1))
before = most()
ops.grad_moments(input, grad, sum, sum_sq, padding=(1, 1))
print(most() - before)
held = torch.zeros(256, 2**20)
print(most() - before)
"""


def test_no_per_sample_gradient_in_memory():
    """The gradients of these 256 samples would fill 2.4 GB.

    In a process of its own: the largest memory that one ever had does not fall.
    """
    result = run_python(MEMORY)
    assert result.returncode == 0, result.stderr
    used, with_a_gigabyte = map(int, result.stdout.split())  # KiB
    assert used < 64 * 1024
    assert with_a_gigabyte > 1000 * 1024  # so it is seen
