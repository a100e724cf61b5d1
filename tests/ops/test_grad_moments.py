"""grad_moments on the CPU: against a float64 truth, its contract and its errors."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import CASES, LAYOUTS, STORED, accumulators, make

from fisherprune import ops
from fisherprune.ops import kernels, reference

ROOT = Path(__file__).parents[2]
CAPABILITIES = ["portable", "avx2", "avx512"]


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


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name):
    assert_right(*make(**CASES[name]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STORED)
def test_every_layout_equals_float64(name, layout):
    input, grad, weight, options = make(**CASES[name])
    assert_right(LAYOUTS[layout](input), LAYOUTS[layout](grad), weight, options)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_equals_float64(capability):
    if CAPABILITIES.index(capability) > CAPABILITIES.index(kernels.cpu_capability()):
        pytest.skip(f"this process has no {capability}")
    script = (
        "from fisherprune.ops import kernels; print(kernels.cpu_capability())\n"
        "from test_grad_moments import *\n"
        "for name in CASES: test_equals_float64(name)\n"
        "for name in STORED:\n"
        "    for layout in LAYOUTS: test_every_layout_equals_float64(name, layout)"
    )
    result = run_python(script, FISHERPRUNE_CPU_CAPABILITY=capability)
    assert (result.returncode, result.stdout) == (0, capability + "\n"), result.stderr


def test_unknown_capability_is_refused():
    script = "from fisherprune.ops import kernels; kernels.cpu_capability()"
    result = run_python(script, FISHERPRUNE_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    message = "FISHERPRUNE_CPU_CAPABILITY must be avx512, avx2 or portable, got sse9"
    assert message in result.stderr


def run_python(script, **environment):
    folders = [ROOT, ROOT / "tests" / "support", Path(__file__).parent]
    path = os.pathsep.join(map(str, folders))
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3, 20]))
    dilation, kernel = draw(pairs), draw(pairs)
    return dict(
        n=draw(st.integers(1, 9)),
        c=groups * draw(st.integers(1, 5)),
        o=groups * draw(st.integers(1, 40)),
        size=(draw(st.integers(7, 12)), draw(st.integers(7, 12))),
        kernel=kernel,
        stride=draw(pairs),
        padding=draw(st.tuples(st.integers(0, 4), st.integers(0, 4))),
        dilation=dilation,
        groups=groups,
        group_size=draw(st.integers(1, 10)),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_any_convolution_equals_float64(case):
    assert_right(*make(**case))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5),
    c=st.integers(33, 80),
    o=st.integers(49, 80),
    size=st.tuples(st.integers(5, 14), st.integers(5, 14)),
    kernel=st.just((3, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    group_size=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_any_wide_3x3_convolution_equals_float64(**case):
    assert_right(*make(**case))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    c=st.integers(1, 100),
    o=st.integers(1, 140),
    positions=st.sampled_from([(), (1,), (2,), (3, 3), (17,)]),
    group_size=st.integers(1, 41),
    seed=st.integers(0, 2**32),
)
def test_any_linear_equals_float64(**case):
    assert_right(*make(**case))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5),
    wide=st.tuples(st.integers(1, 8), st.integers(1, 8)) | st.just((1, 1)),
    groups=st.integers(2, 40),
    size=st.tuples(st.integers(7, 24), st.integers(7, 24)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=pairs,
    padding=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    group_size=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from(["channels_last", "odd_start", "samples_last"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_narrow_groups_equal_float64(wide, groups, layout, **case):
    case |= dict(c=groups * wide[0], o=groups * wide[1], groups=groups)
    input, grad, weight, options = make(**case)
    assert_right(LAYOUTS[layout](input), LAYOUTS[layout](grad), weight, options)


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


def test_groups_are_counted_from_the_first_sample():
    """Seven samples in groups of three: 3 + 3 + 1, the last one a mean over itself."""
    input = torch.ones(7, 1)
    grad = torch.arange(7.0)[:, None]
    sum, sum_sq = torch.zeros(1, 1), torch.zeros(1, 1)
    ops.grad_moments(input, grad, sum, sum_sq, group_size=3)
    assert (sum.item(), sum_sq.item()) == (1 + 4 + 6, 1 + 16 + 36)


@pytest.mark.parametrize(
    "case",
    [
        dict(c=2, o=4, size=(4, 4), kernel=(3, 3), padding=(1, 1)),
        dict(c=3, o=4, size=(2, 2), kernel=(3, 3), padding=(1, 1)),
        dict(c=49, o=49, size=(7, 7), kernel=(3, 3), padding=(1, 1)),
        dict(c=9, o=5, positions=()),
    ],
)
def test_error_stays_small_over_40000_samples(case):
    """The same 2,000 samples come 20 times: rounding that leans adds up."""
    input, grad, weight, options = make(**case | dict(n=2000))
    got = [torch.zeros(weight) for _ in range(2)]
    truth = [x.double() for x in got]
    reference.grad_moments(input, grad, *truth, **options)
    for _ in range(20):
        ops.grad_moments(input, grad, *got, **options)
    assert error(got[0], 20 * truth[0]) <= 1e-5
    assert error(got[1], 20 * truth[1]) <= 1e-5


def test_long_sums_are_accurate():
    """One group over 500,000 positions of one sign is summed in parts."""
    input, grad = torch.rand(512, 2, 32, 32), torch.rand(512, 3, 32, 32)
    assert_right(input, grad, torch.Size((3, 2, 1, 1)), dict(group_size=512))


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name, restore_threads):
    arguments = make(**CASES[name])
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        results.append(moments(ops.grad_moments, *arguments))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("name", [name for name in CASES if "3x3" in name])
@pytest.mark.parametrize("density", [0.02, 0.1])
def test_what_is_zero_by_arithmetic_is_zero(name, density):
    """A weight whose inputs never meet a gradient has no moments, not even rounding."""
    input, grad, weight, options = make(
        **CASES[name], seed=int(torch.randint(2**31, ()))
    )
    for x in (input, grad):
        x *= torch.rand_like(x) < density
    options = options | dict(group_size=1)
    met = [torch.zeros(weight, dtype=torch.float64) for _ in range(2)]
    counts = ((x != 0).double() for x in (input, grad))
    reference.grad_moments(*counts, *met, **options)
    found = torch.zeros(2, *weight)
    ops.grad_moments(input, grad, *found, **options)
    assert not found[:, met[0] == 0].any()
    assert found[1].count_nonzero() >= 0.99 * met[0].count_nonzero()


def hidden(case, size, inputs=slice(None), outputs=slice(None)):
    """Return a case in which large inputs lie where the gradient is zero."""
    input, grad, weight, options = make(**case, seed=int(torch.randint(2**31, ())))
    half = input.shape[-1] // 2
    input[:, inputs, :, :half] *= size
    grad[:, outputs, :, : half + 1] = 0
    grad[:, :, :, : half + 1] *= 1e-3 / size  # of other outputs: they meet
    return input, grad, weight, options


@pytest.mark.parametrize("size", [10, 1e3, 1e5, 1e8])
@pytest.mark.parametrize("name", [name for name in CASES if "wide_3x3" in name])
def test_large_inputs_that_meet_no_gradient_spoil_nothing(name, size, restore_threads):
    """Of a border that no loss sees, say: no weight may hear of its size."""
    few = slice(3, 40), slice(20, 45)
    for chosen in ((slice(None), slice(None)), few):
        case = hidden(CASES[name], size, *chosen)
        assert_right(*case)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(moments(ops.grad_moments, *case))
        assert all(map(torch.equal, *results))


def test_products_beyond_float32_whose_sums_are_within():
    input, grad, weight, options = make(**CASES["wide_3x3"])
    assert_right(input * 2e18, grad * 0.01, weight, options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("wide_3x3_no_padding", (0, 5, 0, 3)),
        (
            "depthwise_rows",
            (1, 5, 3, 10),
        ),  # the last column: no tap on the left meets it
        ("grouped_by_4", (2, 17, 2, 8)),
        ("pointwise_wide", (0, 5, 0, 3)),
        ("linear_2_positions", (3, 1, 5)),
        ("linear_many_outputs", (3, 5)),
    ],
)
def test_what_is_not_finite_stays_where_it_is_met(name, place, bad):
    input, grad, weight, options = make(**CASES[name])
    input[place] = bad
    found = moments(ops.grad_moments, input, grad, weight, options)
    truth = moments(reference.grad_moments, input, grad, weight, options, torch.float64)
    for got, expected in zip(found, truth, strict=True):
        fine = expected.isfinite()
        assert torch.equal(got.isfinite(), fine) and not fine.all()
        assert error(got[fine], expected[fine]) <= 1e-5


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


def test_rows_that_32_bits_cannot_count_are_refused():
    row = torch.ones(1).expand(1, 1, 1, 2**31)
    arguments = VALID | dict(input=row, grad=row)
    arguments |= {name: zeros(1, 1, 1, 1) for name in ("sum", "sum_sq")}
    message = f"at most {2**31 - 1} values a channel, got {2**31}"
    with pytest.raises(RuntimeError, match=f"grad_moments: the input .* {message}"):
        torch.ops.fisherprune.grad_moments(*arguments.values())


def negated(x):
    """Return a view of the same values that torch negates when it is read."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


def test_lazily_negated_operands_are_read_right():
    input, grad, weight, options = make(**CONV)
    got = moments(ops.grad_moments, negated(input), negated(grad), weight, options)
    same = moments(ops.grad_moments, input, grad, weight, options)
    assert all(map(torch.equal, got, same))


@pytest.mark.parametrize("name", ["sum", "sum_sq"])
def test_lazily_negated_accumulators_are_refused(name):
    arguments = VALID | {name: negated(VALID[name])}
    with pytest.raises(RuntimeError) as caught:
        torch.ops.fisherprune.grad_moments(*arguments.values())
    assert str(caught.value) == (
        f"grad_moments: {name} must be a tensor of its own, got a lazily negated view "
        "of another one"
    )


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


@pytest.mark.parametrize("name", ["everything_uneven", "depthwise", "zero_samples"])
def test_opcheck(name):
    input, grad, weight, options = make(**CASES[name])
    torch.library.opcheck(
        torch.ops.fisherprune.grad_moments.default,
        (input, grad, *accumulators(weight), *options.values()),
    )


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


VALID = dict(
    input=zeros(2, 4, 5, 5),
    grad=zeros(2, 6, 3, 3),
    sum=zeros(6, 4, 3, 3),
    sum_sq=zeros(6, 4, 3, 3),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    group_size=1,
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(input=zeros(2, 4, 5)),
            "input must have shape [N, C, H, W], got [2, 4, 5",
        ),
        (dict(grad=zeros(2, 6)), "grad must have shape [N, O, P, Q], got [2, 6]"),
        (
            dict(input=zeros(2, 4, 5, 5).double()),
            "input must be float32, float16 or bfloat16, got Double",
        ),
        (
            dict(grad=zeros(2, 6, 3, 3).int()),
            "grad must be float32, float16 or bfloat16, got Int",
        ),
        (dict(stride=(0, 1)), "stride must be two integers of at least 1"),
        (dict(stride=(1,)), "stride must be two integers of at least 1"),
        (dict(padding=(0, -1)), "padding must be two integers of at least 0"),
        (dict(dilation=(0, 0)), "dilation must be two integers of at least 1"),
        (
            dict(dilation=(1, 2**61)),
            f"dilation * (kernel - 1) must be at most {2**60}, got {2**61} * 2",
        ),
        (
            dict(padding=(2**62, 0)),
            f"padding must leave at most {2**60} rows and columns of the padded input, "
            f"got {2**62} on both sides of 5",
        ),
        (
            dict(sum=zeros(6, 4)),
            "sum must have shape [O, C / groups, Y, X], got [6, 4]",
        ),
        (dict(group_size=0), "group_size must be at least 1, got 0"),
        (
            dict(groups=3),
            "groups must divide the channels of input and grad, got groups 3 "
            "for 4 and 6",
        ),
        (dict(groups=0), "groups must divide the channels"),
        (
            dict(grad=zeros(3, 6, 3, 3)),
            "grad must have as many samples as input, 2, got 3",
        ),
        (
            dict(grad=zeros(2, 6, 3, 4)),
            "grad must have shape [2, O, 3, 3] for this input and kernel, got "
            "[2, 6, 3, 4]",
        ),
        (
            dict(sum=zeros(6, 5, 3, 3)),
            "sum must have shape [6, 4, 3, 3], got [6, 5, 3, 3]",
        ),
        (
            dict(sum_sq=zeros(6, 4, 3, 1)),
            "sum_sq must have shape [6, 4, 3, 3], got [6, 4, 3, 1]",
        ),
        (
            dict(sum=zeros(6, 4, 3, 3).double()),
            "sum must be a contiguous float32 tensor",
        ),
        (
            dict(sum_sq=zeros(6, 4, 3, 3).mT),
            "sum_sq must be a contiguous float32 tensor",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(wrong, message):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.fisherprune.grad_moments(*(VALID | wrong).values())
    assert str(caught.value).startswith("grad_moments: " + message)


@pytest.mark.parametrize("name", ["sum", "sum_sq"])
@pytest.mark.parametrize("other", ["input", "grad"])
def test_accumulators_that_share_memory_are_refused(name, other):
    memory = torch.zeros(1000)
    shared = memory[: VALID[other].numel()].view_as(VALID[other])
    last = VALID[other].numel() - 1
    accumulator = memory[last : last + VALID[name].numel()].view_as(VALID[name])
    arguments = VALID | {name: accumulator, other: shared}
    with pytest.raises(
        RuntimeError, match=f"{name} must not share memory with {other}"
    ):
        torch.ops.fisherprune.grad_moments(*arguments.values())


def test_accumulators_that_share_memory_with_each_other_are_refused():
    arguments = VALID | dict(sum_sq=VALID["sum"])
    with pytest.raises(RuntimeError, match="sum must not share memory with sum_sq"):
        torch.ops.fisherprune.grad_moments(*arguments.values())


def test_neighbours_in_memory_are_accepted():
    sum, sum_sq = torch.zeros(2, 6, 4, 3, 3)
    torch.ops.fisherprune.grad_moments(*(VALID | dict(sum=sum, sum_sq=sum_sq)).values())
