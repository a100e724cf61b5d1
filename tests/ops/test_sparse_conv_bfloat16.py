"""sparse_conv2d of bfloat16: what float32 returns of the same numbers, rounded once."""

from functools import partial

import pytest
import torch
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import CASES, LAYOUTS, convolutions, make
from torch.library import opcheck

from fisherprune import ops
from fisherprune.ops import dense

HALF = torch.bfloat16
FLOAT32_SAMPLES = 16  # that float32 takes at a time
TOLERANCE = 1e-6
WITHOUT_GRAD = [name for name in LAYOUTS if "expanded" not in name]


def drawn(case, layout="contiguous"):
    """Draw input, gradient of the output and residual in bfloat16."""
    size = case.dense()[0].shape
    form = LAYOUTS[layout]
    others = LAYOUTS[layout if layout in WITHOUT_GRAD else "contiguous"]
    residual, grad = (others(torch.randn(size).to(HALF)) for _ in range(2))
    return form(case.input.to(HALF)), grad, residual


def of_images(case, x, grad, residual=None, relu=False):
    """Return the output, and the gradient of the input; the ops read what is given."""
    pattern = case.values, *case.pattern
    out = ops.sparse_conv2d(
        x, *pattern, case.bias, **case.call, relu=relu, residual=residual
    )
    return out, ops.sparse_conv2d_input(x.shape, *pattern, grad, **case.call)


def assert_rounded(case, x, grad, residual=None, relu=False):
    """Compare with what comes of the same numbers in float32.

    Of few samples, float32 adds in another order: then a sum may round the other way.
    """
    found = of_images(case, x, grad, residual, relu)
    wide = (None if t is None else t.float() for t in (x, grad, residual))
    for one, other in zip(found, of_images(case, *wide, relu), strict=True):
        assert one.dtype == HALF and other.dtype == torch.float32
        assert one.permute(1, 2, 3, 0).is_contiguous()
        if len(x) >= FLOAT32_SAMPLES:
            assert torch.equal(one, other.to(HALF))
        else:
            largest = float(other.abs().max()) if other.numel() else 0.0
            sides = {"rtol": 2**-8, "atol": 1e-5 * largest}
            torch.testing.assert_close(one.float(), other, **sides)


def assert_right(case, layout="contiguous", relu=False, with_residual=False):
    """Compare outputs and gradients of images by bits, of values with float64."""
    x, grad, residual = drawn(case, layout)
    assert_rounded(case, x, grad, residual if with_residual else None, relu)
    case.input = x.float()
    found = ops.sparse_conv2d_weight(x, *case.pattern, grad, **case.call)
    assert found.dtype == torch.float32
    assert case.truth(grad)[2].error(found) <= TOLERANCE


@pytest.mark.parametrize("samples", [1, 16, 31, 32, 33, 48, 64, 100])
@pytest.mark.parametrize("name", CASES)
def test_is_the_rounded_float32_result(name, samples):
    assert_right(make(**CASES[name] | {"n": samples}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_layout(name, layout):
    assert_right(make(**CASES[name] | {"n": 70}, bias=False), layout)


@settings(max_examples=100)
@given(
    convolutions(most=100), st.sampled_from(list(LAYOUTS)), st.booleans(), st.booleans()
)
def test_any_convolution(case, layout, relu, residual):
    assert_right(make(**case), layout, relu, residual)


@settings(max_examples=40)
@given(
    n=st.integers(1, 100),
    c=st.integers(1, 150),
    o=st.integers(1, 120),
    density=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_any_linear(**case):
    assert_right(make(size=(1, 1), kernel=(1, 1), **case))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability(capability):
    run_with(
        capability,
        __file__,
        "for name in CASES:\n"
        "    for n, layout in ((33, 'samples_innermost'), (70, 'contiguous')):\n"
        "        case = make(**CASES[name] | {'n': n})\n"
        "        assert_right(case, layout, relu=n > 50, with_residual=True)\n"
        "test_numbers_that_are_special()\n",
    )


@pytest.mark.parametrize("samples", [128, 136])
def test_images_larger_than_the_caches(samples):
    case = make(samples, 24, 20, (32, 33), (3, 3), padding=(1, 1), density=0.05)
    x, grad, residual = drawn(case, "samples_innermost")
    assert_rounded(case, x, grad, residual, relu=True)


def test_more_channels_than_a_tile_takes():
    """In float32 their sums are cut, and added up in the image."""
    case = make(32, 1500, 40, (9, 9), (3, 3), padding=(1, 1), density=0.01)
    x, grad, residual = drawn(case, "samples_innermost")
    assert_rounded(case, x, grad, residual)


def test_numbers_that_are_special():
    """Ties, denormal numbers, what rounds to infinity, infinity, NaN."""
    halves = torch.arange(-(2**15), 2**15).short().view(HALF).view(1024, 64, 1, 1)
    case = make(1024, 64, 64, (1, 1), (1, 1), bias=False)
    case.mask = torch.eye(64).bool().view(64, 64, 1, 1)
    for factor in (1.0, 1 + 2**-8, 1 + 2**-7 + 2**-9, 0.01, 3e38, 1e-30):
        case.weight = torch.full((64, 64, 1, 1), factor)
        for x in (halves, LAYOUTS["samples_innermost"](halves), halves[:20]):
            found = of_images(case, x, x)
            truth = x.float() * factor
            for one in found:
                assert torch.equal(one.isnan(), truth.isnan())
                known = ~truth.isnan()
                assert torch.equal(one[known], truth.to(HALF)[known])


def test_infinity_below_a_pruned_weight_is_not_read():
    input = torch.full((40, 1, 2, 2), float("inf"), dtype=HALF)
    input[:, :, 0, 0] = 1
    rows, columns = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0]))
    out = ops.sparse_conv2d(input, torch.ones(1), rows, columns, kernel=(2, 2))
    assert torch.equal(out, torch.ones(40, 1, 1, 1, dtype=HALF))


@pytest.mark.parametrize("samples", [8, 64, 80])
@pytest.mark.parametrize("name", ["plain_3x3", "stride_2", "linear", "depthwise"])
def test_same_bits_for_any_number_of_threads(name, samples, restore_threads):
    case, results = make(**CASES[name] | {"n": samples}), []
    x, grad, _ = drawn(case)
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        by_values = ops.sparse_conv2d_weight(x, *case.pattern, grad, **case.call)
        results.append([*of_images(case, x, grad), by_values])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("first", [torch.float32, torch.float16, HALF])
@pytest.mark.parametrize("second", [torch.float32, torch.float16, HALF])
def test_gradients_of_values_of_any_two_dtypes(first, second):
    case = make(**CASES["stride_2"] | {"n": 75})
    x, grad = case.input.to(first), torch.randn(case.dense()[0].shape).to(second)
    case.input = x.float()
    for layout in ("contiguous", "samples_innermost"):
        form = LAYOUTS[layout]
        found = ops.sparse_conv2d_weight(
            form(x), *case.pattern, form(grad), **case.call
        )
        assert case.truth(grad)[2].error(found) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_what_other_devices_run(name):
    case = make(**CASES[name])
    x, grad, residual = drawn(case)
    pattern, options = (case.values, *case.pattern), case.flat()
    bodies = dense.BODIES
    found = [
        bodies["sparse_conv2d"](x, *pattern, case.bias, *options, True, residual),
        bodies["sparse_conv2d_input"](x.shape, *pattern, grad, *options),
    ]
    for one, other in zip(
        found, of_images(case, x, grad, residual, relu=True), strict=True
    ):
        assert one.dtype == HALF and one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("name", ["plain_3x3", "everything_uneven", "one_sample"])
def test_opcheck(name):
    case = make(**CASES[name] | {"n": 33})
    x, grad, residual = (t.requires_grad_() for t in drawn(case))
    v, b = case.values.requires_grad_(), case.bias.requires_grad_()
    found, options = torch.ops.fisherprune, case.flat()
    for relu in (False, True):
        opcheck(found.sparse_conv2d, (x, v, *case.pattern, b, *options, relu))
        with_it = (x, v, *case.pattern, b, *options, relu, residual)
        opcheck(found.sparse_conv2d, with_it)
    size = list(x.shape)
    opcheck(found.sparse_conv2d_input, (size, v, *case.pattern, grad, *options))
    opcheck(found.sparse_conv2d_weight, (x, *case.pattern, grad, *options))


def gradients(case, x, dtype=None, **options):
    """Return the output and all gradients, under autocast to a dtype if given."""
    leaves = [x, case.values, case.bias, *options.values()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    options = dict(zip(options, leaves[3:], strict=True))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = ops.sparse_conv2d(
            *leaves[:2], *case.pattern, leaves[2], **case.call, **options
        )
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def test_autocast_takes_images_in_bfloat16():
    case = make(**CASES["plain_3x3"] | {"n": 40})
    x, _, residual = drawn(case)
    residual = residual.float()
    found = gradients(case, x.float(), HALF, residual=residual)
    expected = gradients(case, x, residual=residual.to(HALF))
    assert found[0].dtype == HALF
    assert all(each.dtype == torch.float32 for each in found[1:])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_autocast_to_float16_computes_in_float32():
    case = make(**CASES["plain_3x3"])
    x = drawn(case)[0]
    found, expected = gradients(case, x, torch.float16), gradients(case, x.float())
    assert found[0].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_backward_within_autocast():
    case = make(**CASES["plain_3x3"] | {"n": 40})
    x = drawn(case)[0]
    expected = gradients(case, x.float(), HALF)
    with torch.autocast("cpu", HALF):
        found = gradients(case, x.float(), HALF)
    assert all(map(torch.equal, found, expected))


def test_the_gradient_of_the_bias_is_summed_up_in_float32():
    case = make(**CASES["plain_3x3"] | {"n": 100})
    x = drawn(case)[0]
    b = case.bias.requires_grad_()
    out = ops.sparse_conv2d(x, case.values, *case.pattern, b, **case.call)
    grad = torch.randn(out.shape).to(HALF)
    (found,) = torch.autograd.grad(out, b, grad)
    torch.testing.assert_close(found, grad.float().sum((0, 2, 3)))


def test_gradients_of_gradients():
    """They have the dtypes of what they are of, and are near float64's."""
    case = make(**CASES["plain_3x3"] | {"n": 33, "bias": False})
    x, grad, direction = (t.requires_grad_() for t in drawn(case))
    truth, leaves = case.dense()
    del truth
    v = case.values.requires_grad_()
    call = partial(ops.sparse_conv2d, **case.call)
    out = call(x, v, *case.pattern)
    by_x, by_v = torch.autograd.grad(out, (x, v), grad, create_graph=True)
    total = by_x.float().square().sum() + by_v.square().sum()
    found = torch.autograd.grad(total, (x, v, grad))
    assert [each.dtype for each in found] == [HALF, torch.float32, HALF]
    wide = [t.detach().double() for t in (x, leaves[1], grad)]
    wide = [t.requires_grad_() for t in wide]
    out = torch.nn.functional.conv2d(wide[0], wide[1] * case.mask, **case.options)
    by_x, by_w = torch.autograd.grad(out, wide[:2], wide[2], create_graph=True)
    total = by_x.square().sum() + (by_w * case.mask).square().sum()
    expected = list(torch.autograd.grad(total, wide))
    expected[1] = expected[1][case.mask]
    for one, true in zip(found, expected, strict=True):
        assert (one.double() - true).norm() <= 2**-7 * true.norm()


def test_a_residual_of_another_dtype_is_refused():
    case = make(**CASES["plain_3x3"])
    x, _, residual = drawn(case)
    pattern = case.values, *case.pattern
    for image, other, name in (
        (x, residual.float(), "BFloat16"),
        (x.float(), residual, "Float"),
    ):
        with pytest.raises(RuntimeError, match=rf"residual must be {name} of shape \["):
            ops.sparse_conv2d(image, *pattern, **case.call, residual=other)
