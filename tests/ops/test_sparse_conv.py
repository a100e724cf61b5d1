"""sparse_conv2d and its gradients: against dense convolutions in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import CASES, LAYOUTS, convolutions, make
from torch.library import opcheck

from fisherprune import ops
from fisherprune.ops import dense, reference

TOLERANCE = 1e-6


def lies_samples_innermost(x):
    """Return whether it lies in memory as [C, H, W, N]."""
    return x.permute(1, 2, 3, 0).is_contiguous()


def leaves_of(case, device="cpu"):
    """Return input, values and bias, to be differentiated."""
    leaves = [case.input, case.values] + [case.bias] * (case.bias is not None)
    return [leaf.detach().to(device).requires_grad_() for leaf in leaves]


def run(case, leaves, **options):
    """Call the op, with rows and columns on the device of the leaves."""
    x, v, *b = leaves
    rows, columns = (t.to(x.device) for t in case.pattern)
    return ops.sparse_conv2d(x, v, rows, columns, *b, **case.call, **options)


def random_grad(case, layout="contiguous"):
    """Draw a gradient of the output; expanded ones have a test of their own."""
    grad = torch.randn(case.dense()[0].shape)
    return grad if "expanded" in layout else LAYOUTS[layout](grad)


def assert_right(case, layout="contiguous", grad=None):
    """Compare output and all gradients with the masked dense convolution's."""
    case.input = LAYOUTS[layout](case.input)
    grad = random_grad(case, layout) if grad is None else grad
    leaves = leaves_of(case)
    out = run(case, leaves)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    for one, truth in zip(found, case.truth(grad), strict=True):
        assert one.dtype == torch.float32 and one.shape == truth.sums.shape
        assert truth.error(one) <= TOLERANCE
    assert all(map(lies_samples_innermost, found[:2]))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, density):
    assert_right(make(**CASES[name], density=density))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_equals_float64(name, layout):
    assert_right(make(**CASES[name], bias=False), layout)


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_a_sum(name):
    """One number, expanded: it has no strides."""
    case = make(**CASES[name])
    assert_right(case, grad=torch.ones(()).expand(case.dense()[0].shape))


@pytest.mark.parametrize("name", CASES)
def test_relu_is_that_of_the_output(name):
    case = make(**CASES[name], density=0.5)
    grad, found = random_grad(case), []
    for relu in (True, False):
        leaves = leaves_of(case)
        out = run(case, leaves, relu=relu)
        out = out if relu else out.relu()
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if "expanded" not in n])
@pytest.mark.parametrize("name", CASES)
def test_a_residual_is_added(name, layout, relu):
    case = make(**CASES[name], density=0.3)
    truth = case.dense()[0]
    residual = LAYOUTS[layout](torch.randn(truth.shape)).requires_grad_()
    grad, leaves = random_grad(case, layout), leaves_of(case)
    out = run(case, leaves, relu=relu, residual=residual)
    found = torch.autograd.grad(out, [residual, *leaves], grad)
    truth = truth.detach() + residual.detach().double()
    truth = truth.relu() if relu else truth
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert lies_samples_innermost(out)
    behind = torch.where(out.detach() > 0, grad, 0) if relu else grad
    assert torch.equal(found[0], behind)
    for one, truth in zip(found[1:], case.truth(behind)[1:], strict=True):
        assert truth.error(one) <= TOLERANCE


def test_a_residual_of_a_large_image_whose_channels_are_cut():
    """Larger than the caches, with more input channels than a tile takes."""
    case = make(16, 1024, 170, (20, 20), (3, 3), padding=(1, 1), density=0.01)
    residual = torch.randn(16, 170, 20, 20)
    with torch.no_grad():
        out = run(case, leaves_of(case), relu=True, residual=residual)
        truth = (case.dense()[0] + residual).relu()
    assert (out - truth).abs().max() <= 1e-5 * truth.abs().max()


@settings(max_examples=80)
@given(convolutions(), st.sampled_from(list(LAYOUTS)))
def test_any_convolution_equals_float64(case, layout):
    assert_right(make(**case), layout)


@settings(max_examples=40)
@given(
    n=st.integers(1, 40),
    c=st.integers(1, 150),
    o=st.integers(1, 120),
    density=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_any_linear_equals_float64(**case):
    assert_right(make(size=(1, 1), kernel=(1, 1), **case))


@pytest.mark.parametrize("name", CASES)
def test_twins_in_float64_say_the_same(name):
    case = make(**CASES[name])
    truth, leaves = case.dense()
    grad = torch.randn(truth.shape, dtype=torch.float64)
    expected = torch.autograd.grad(truth, leaves, grad)
    rows, columns = case.pattern
    input, values, bias = (t.double() for t in (case.input, case.values, case.bias))
    out = reference.sparse_conv2d(input, values, rows, columns, bias, **case.call)
    by_input = reference.sparse_conv2d_input(
        input.shape, values, rows, columns, grad, **case.call
    )
    by_values = reference.sparse_conv2d_weight(input, rows, columns, grad, **case.call)
    torch.testing.assert_close(out, truth.detach())
    torch.testing.assert_close(by_input, expected[0])
    torch.testing.assert_close(by_values, expected[1][case.mask])


def second_order(output, leaves, grad, direction):
    """Return gradients of a function of first gradients."""
    by_input, by_weight = torch.autograd.grad(output, leaves, grad, create_graph=True)
    product = (by_input * direction).sum() + by_weight.square().sum()
    return torch.autograd.grad(product, (*leaves, grad))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients_equal_float64(name):
    case = make(**CASES[name], bias=False)
    grad = random_grad(case).requires_grad_()
    direction = torch.randn(case.input.shape)
    truth, leaves = case.dense()
    double = grad.detach().double().requires_grad_()
    expected = list(second_order(truth, leaves, double, direction.double()))
    expected[1] = expected[1][case.mask]
    leaves = leaves_of(case)
    found = second_order(run(case, leaves), leaves, grad, direction)
    for one, true in zip(found, expected, strict=True):
        largest = float(true.abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["plain_3x3", "everything_uneven", "one_sample"])
def test_opcheck(name):
    case = make(**CASES[name])
    rows, columns = case.pattern
    x, v = case.input.requires_grad_(), case.values.requires_grad_()
    b = case.bias.requires_grad_()
    grad = torch.randn_like(case.dense()[0], dtype=torch.float32).requires_grad_()
    found, options = torch.ops.fisherprune, case.flat()
    for relu in (False, True):
        opcheck(found.sparse_conv2d, (x, v, rows, columns, b, *options, relu))
        residual = torch.randn_like(grad).requires_grad_()
        with_it = (x, v, rows, columns, b, *options, relu, residual)
        opcheck(found.sparse_conv2d, with_it)
    opcheck(found.sparse_conv2d, (x, v, rows, columns, None, *options))
    size = list(x.shape)
    opcheck(found.sparse_conv2d_input, (size, v, rows, columns, grad, *options))
    opcheck(found.sparse_conv2d_weight, (x, rows, columns, grad, *options))


def test_the_output_may_be_changed_in_place():
    """As ReLU(inplace=True) does; autograd forbids it for views of custom ops."""
    case = make(**CASES["plain_3x3"])
    leaves, grad = leaves_of(case), random_grad(case)
    out = run(case, leaves)
    assert not out._is_view()
    found = torch.autograd.grad(out.relu_(), leaves, grad)
    leaves = leaves_of(case)
    expected = torch.autograd.grad(run(case, leaves).relu(), leaves, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_no_samples():
    case = make(**CASES["plain_3x3"] | {"n": 0})
    rows, columns = case.pattern
    v = case.values.requires_grad_()
    out = ops.sparse_conv2d(case.input, v, rows, columns, case.bias, **case.call)
    assert out.shape == case.dense()[0].shape
    out.sum().backward()
    assert v.grad.shape == v.shape and not v.grad.any()


def test_images_of_float16():
    """They are read as they are; what comes is in float32, on other devices, too."""
    case = make(**CASES["everything_uneven"])
    low, grad = case.input.half(), random_grad(case).half()
    case.input = low.float()
    truths, (rows, columns) = case.truth(grad), case.pattern
    options, size = case.flat(), case.input.shape
    op = torch.ops.fisherprune
    for body in (dense.BODIES, {n: getattr(op, n) for n in dense.BODIES}):
        found = [
            body["sparse_conv2d"](low, case.values, rows, columns, case.bias, *options),
            body["sparse_conv2d_input"](
                size, case.values, rows, columns, grad, *options
            ),
            body["sparse_conv2d_weight"](low, rows, columns, grad, *options),
        ]
        for one, truth in zip(found, truths[:3], strict=True):
            assert one.dtype == torch.float32
            assert truth.error(one) <= 3 * TOLERANCE
    opcheck(op.sparse_conv2d, (low, case.values, rows, columns, None, *options))
    opcheck(op.sparse_conv2d_weight, (low, rows, columns, grad, *options))


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name, restore_threads):
    case, results = make(**CASES[name]), []
    grad = random_grad(case)
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        leaves = leaves_of(case)
        out = run(case, leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_what_other_devices_run_equals_float64(name):
    """The dense bodies themselves, which no call reaches on a CPU with kernels."""
    case = make(**CASES[name])
    grad, options = random_grad(case), case.flat()
    pattern, bodies = case.pattern, dense.BODIES
    found = [
        bodies["sparse_conv2d"](case.input, case.values, *pattern, case.bias, *options),
        bodies["sparse_conv2d_input"](
            case.input.shape, case.values, *pattern, grad, *options
        ),
        bodies["sparse_conv2d_weight"](case.input, *pattern, grad, *options),
    ]
    for one, truth in zip(found, case.truth(grad)[:3], strict=True):
        assert truth.error(one) <= 3 * TOLERANCE  # PyTorch's own rounding


def test_dense_weight_is_differentiable():
    case = make(**CASES["plain_3x3"])
    values = case.values.double().requires_grad_()
    shape = case.weight.shape
    weight = dense.dense_weight(values, *case.pattern, shape)
    assert torch.equal(weight.detach(), (case.weight * case.mask).double())
    assert torch.autograd.gradcheck(
        lambda v: dense.dense_weight(v, *case.pattern, shape).square().sum(), values
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_float64(name):
    case = make(**CASES[name])
    grad = random_grad(case)
    leaves = leaves_of(case, "cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        out = run(case, leaves)
        found = [out, *torch.autograd.grad(out, leaves, grad.cuda())]
    for one, truth in zip(found, case.truth(grad), strict=True):
        assert truth.error(one) <= 3 * TOLERANCE  # PyTorch's own rounding


def test_what_lies_below_a_pruned_weight_is_not_read():
    input = torch.full((3, 1, 2, 2), float("inf"))
    input[:, :, 0, 0] = 1
    rows, columns = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0]))
    out = ops.sparse_conv2d(input, torch.ones(1), rows, columns, kernel=(2, 2))
    assert torch.equal(out, torch.ones(3, 1, 1, 1))
