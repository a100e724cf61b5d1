"""grad_moments on the CPU against a float64 truth."""

import pytest
import torch
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import CASES, LAYOUTS, STORED, accumulators, make
from moment_checks import assert_right, run_python

from fisherprune import ops


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
    run_with(
        capability,
        __file__,
        "for name in CASES: test_equals_float64(name)\n"
        "for name in STORED:\n"
        "    for layout in LAYOUTS: test_every_layout_equals_float64(name, layout)",
    )


def test_unknown_capability_is_refused():
    script = "from fisherprune.ops import kernels; kernels.cpu_capability()"
    result = run_python(script, FISHERPRUNE_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    message = "FISHERPRUNE_CPU_CAPABILITY must be avx512, avx2 or portable, got sse9"
    assert message in result.stderr


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
    positions=st.sampled_from([(), (1,), (2,), (3, 3), (17,), (70,)]),
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


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    c=st.integers(16, 100),
    o=st.integers(1, 60),
    positions=st.sampled_from([(2,), (5,), (17,), (70,), (5, 7)]),
    group_size=st.integers(1, 41),
    beside=st.sampled_from([1, 4, 20, 64, 100]),
    seed=st.integers(0, 2**32),
)
def test_gradients_that_lie_beside_others(beside, **case):
    """What lies there is not read into any moment, however far it is to the next."""
    input, grad, weight, options = make(**case)
    wide = torch.full((*grad.shape[:-1], grad.shape[-1] + beside), torch.nan)
    wide[..., : grad.shape[-1]] = grad
    assert_right(input, wide[..., : grad.shape[-1]], weight, options)
    found = [accumulators(weight) for _ in range(2)]
    for lain, sums in zip((grad, wide[..., : grad.shape[-1]]), found, strict=True):
        ops.grad_moments(input, lain, *sums, **options)
    assert all(map(torch.equal, *found))


def test_groups_are_counted_from_the_first_sample():
    """Seven samples in groups of three: 3 + 3 + 1, the last one a mean over itself."""
    input = torch.ones(7, 1)
    grad = torch.arange(7.0)[:, None]
    sum, sum_sq = torch.zeros(1, 1), torch.zeros(1, 1)
    ops.grad_moments(input, grad, sum, sum_sq, group_size=3)
    assert (sum.item(), sum_sq.item()) == (1 + 4 + 6, 1 + 16 + 36)


@pytest.mark.parametrize("name", ["everything_uneven", "depthwise", "zero_samples"])
def test_opcheck(name):
    input, grad, weight, options = make(**CASES[name])
    torch.library.opcheck(
        torch.ops.fisherprune.grad_moments.default,
        (input, grad, *accumulators(weight), *options.values()),
    )
