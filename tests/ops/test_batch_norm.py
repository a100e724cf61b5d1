"""batch_norm on the CPU: against PyTorch in float64, its contract and its errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fisherprune import ops
from fisherprune.errors import FisherpruneError
from fisherprune.ops import reference

EPS = 1e-5


def lying(x, order):
    """Return a copy whose axes lie in this order, the last one innermost."""
    inverse = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "samples_innermost": lambda x: lying(x, [*range(1, x.dim()), 0]),
    "channels_last": lambda x: lying(x, [0, *range(2, x.dim()), 1]),
    "channels_within": lambda x: lying(x, [*range(2, x.dim()), 1, 0]),
    "gaps": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "every_second": lambda x: torch.repeat_interleave(x, 2, 0)[::2],
}
"""How a tensor may lie in memory."""

SHAPES = [
    (7, 5, 3, 3),
    (1, 3, 5, 7),
    (40, 2, 3, 5),
    (33, 17, 2, 2),
    (128, 16, 8, 8),
    (4, 3, 70, 70),
    (33, 200, 1, 1),
    (20, 30),
    (2, 1),
    (9, 4, 21),
    (3, 2, 3, 4, 5),
    (1, 1, 100, 100),
    (2, 70, 4, 4),
    (600, 3, 2, 2),
]


def draw(shape, layout="contiguous", mean=0.0, dtype=torch.float32, affine=True):
    """Return input, residual, gradient, weight and bias."""
    each = (shape[1], *(1 for _ in shape[2:]))
    x = torch.randn(shape) * (torch.rand(each) + 0.5) + mean * torch.randn(each)
    tensors = [LAYOUTS[layout](t.to(dtype)) for t in (x, *torch.randn(2, *shape))]
    return *tensors, *(torch.randn(2, shape[1]) if affine else (None, None))


def leaves_of(case, with_residual, dtype=None):
    """Return input, residual, weight and bias as leaves, and those that there are."""
    x, residual, _, weight, bias = case
    kept = [x, residual if with_residual else None, weight, bias]
    leaves = [k if k is None else k.detach().to(dtype).requires_grad_() for k in kept]
    return leaves, [leaf for leaf in leaves if leaf is not None]


def results(case, relu, with_residual):
    """Return output, mean, scale, and the gradients that there are."""
    leaves, inputs = leaves_of(case, with_residual)
    y, mean, scale = ops.batch_norm(*leaves, eps=EPS, relu=relu)
    return y.detach(), mean, scale, torch.autograd.grad(y, inputs, case[2])


def truths(case, passes, with_residual):
    """Return the same by PyTorch in float64; ``passes``: what the ReLU lets through."""
    (x, residual, weight, bias), inputs = leaves_of(case, with_residual, torch.float64)
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    if residual is not None:
        y = y + residual
    over = [i for i in range(x.dim()) if i != 1]
    variance, mean = torch.var_mean(x.detach(), over, correction=0)
    grads = torch.autograd.grad(y * passes, inputs, case[2].double())
    return y.detach(), mean, (variance + EPS).rsqrt(), grads


def error(result, truth, size):
    return ((result.double() - truth).norm() / size).item()


def assert_right(case, relu, with_residual, bound=1e-6, sums=2e-6):
    """Compare; what may cancel, on the scale of what it is the sum of."""
    y, mean, scale, grads = results(case, relu, with_residual)
    passes = (y > 0).double() if relu else torch.ones(())
    full, mu, sigma, expected = truths(case, passes, with_residual)
    assert error(y, full.relu() if relu else full, full.norm()) <= bound
    assert error(mean, mu, (mu**2 + sigma**-2).sqrt().norm()) <= 1e-7
    assert error(scale, sigma, sigma.norm()) <= 1e-6
    factor = sigma if case[3] is None else sigma * case[3]
    g = case[2].double()
    size = (g * factor.view(-1, *(1 for _ in g.shape[2:]))).norm()
    assert error(grads[0], expected[0], size) <= bound
    if with_residual:
        assert error(grads[1], expected[1], g.norm()) <= bound
    of_affine = slice(1 + with_residual, None)
    for got, want in zip(grads[of_affine], expected[of_affine], strict=True):
        assert error(got, want, g.norm()) <= sums


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, layout, residual, relu):
    assert_right(draw(shape, layout), relu, residual)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_equals_float64(capability):
    run_with(
        capability,
        __file__,
        "for shape in SHAPES:\n"
        "    for layout in LAYOUTS: test_equals_float64(shape, layout, True, True)\n"
        "test_16_bits('samples_innermost')",
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    c=st.integers(1, 40),
    positions=st.lists(st.integers(1, 13), max_size=3),
    layout=st.sampled_from(list(LAYOUTS)),
    affine=st.booleans(),
    relu=st.booleans(),
    residual=st.booleans(),
)
def test_any_shape_equals_float64(n, c, positions, layout, affine, relu, residual):
    case = draw((n, c, *positions), layout, affine=affine)
    if case[0][:, 0].numel() > 1:
        assert_right(case, relu, residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 6, 9, 9), (64, 4, 20, 20), (50, 30)], ids=str)
def test_means_far_above_the_deviation(shape, layout):
    """Sums of x - mean, of which float32 has but four digits, are put right."""
    assert_right(draw(shape, layout, mean=1e4), False, True, bound=3e-6, sums=3e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.1, -12345.678])
def test_constant_channels(layout, value):
    """Only eps is left of the scale; the output is the bias."""
    x = LAYOUTS[layout](torch.full((12, 7, 5, 5), value))
    bias = torch.randn(7)
    y, mean, scale = ops.batch_norm(x, bias=bias, eps=EPS)
    torch.testing.assert_close(mean, torch.full((7,), value), rtol=1e-7, atol=0)
    torch.testing.assert_close(scale, torch.full((7,), EPS**-0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(y, bias.view(7, 1, 1).expand_as(y), rtol=1e-6, atol=1e-6)


def test_one_value_per_channel():
    y, mean, scale = ops.batch_norm(torch.tensor([[3.0, -2.0]]), eps=0.25)
    assert y.tolist() == [[0, 0]] and mean.tolist() == [3, -2]
    assert scale.tolist() == [2, 2]


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (40, 20)])
def test_what_is_no_number_stays(shape):
    x = torch.randn(shape)
    x[1, 2] = float("nan")
    y, mean, _ = ops.batch_norm(x, relu=True)
    assert y[:, 2].isnan().all() and mean[2].isnan()
    assert not y[:, :2].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bits(layout):
    """The arithmetic is that of float32; only what is returned is rounded."""
    case = draw((9, 20, 7, 5), layout, dtype=torch.bfloat16)
    y, mean, scale, grads = results(case, True, True)
    assert y.dtype == grads[0].dtype == grads[1].dtype == torch.bfloat16
    assert mean.dtype == scale.dtype == grads[2].dtype == torch.float32
    full, mu, sigma, expected = truths(case, (y > 0).double(), True)
    assert torch.equal(y, full.float().relu().bfloat16()) or (
        error(y, full.relu(), full.norm()) <= 2**-8
    )
    assert error(mean, mu, (mu**2 + sigma**-2).sqrt().norm()) <= 1e-7
    assert error(scale, sigma, sigma.norm()) <= 1e-6
    for got, want in zip(grads, expected, strict=True):
        bound = 2**-8 if got.dtype == torch.bfloat16 else 1e-6
        assert error(got, want, want.norm()) <= bound


def test_rounding_to_16_bits():
    """To the nearest, ties to even, as PyTorch rounds; NaN and infinity stay."""
    bits = torch.randint(-(2**31), 2**31, (4096,)).int()
    bits[:64] = (bits[:64] & -65536) + 0x8000  # ties
    residual = bits.view(torch.float32).bfloat16().view(-1, 1)
    x = torch.zeros_like(residual)
    y, _, _ = ops.batch_norm(x, residual)
    assert torch.equal(y.isnan(), residual.isnan())
    assert torch.equal(y[~y.isnan()], residual[~y.isnan()])
    scales = torch.rand(4096)
    scales[:2048] = 1 + torch.randint(512, (2048,)) / 512  # ties among them
    signs = torch.tensor([[-1.0], [1.0]]).expand(2, 4096)
    y, _, scale = ops.batch_norm(signs.bfloat16(), weight=scales, eps=0.0)
    assert scale.eq(1).all()
    assert torch.equal(y, (signs * scales).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_the_input(layout):
    case = draw((6, 5, 4, 3), layout)
    y, _, _, grads = results(case, True, True)
    model = torch.empty_like(case[0])
    assert y.stride() == grads[0].stride() == grads[1].stride() == model.stride()


@pytest.mark.parametrize(("own", "other"), [*itertools.permutations(LAYOUTS, 2)])
def test_operands_may_lie_otherwise(own, other):
    x, residual, grad, *rest = draw((6, 5, 4, 3), own)
    moved = (x, *(LAYOUTS[other](t) for t in (residual, grad)), *rest)
    wanted, got = (results(c, True, True) for c in ((x, residual, grad, *rest), moved))
    assert torch.equal(wanted[0], got[0])
    assert all(map(torch.equal, wanted[3], got[3]))


def test_expanded_gradients():
    """As those of a mean over positions."""
    x, residual, grad, *rest = draw((6, 5, 4, 3), "samples_innermost")
    grad = grad[:, :, :1, :1].expand_as(x)
    assert_right((x, residual, grad, *rest), True, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(30, 3, 40, 40), (64, 90, 6, 6)], ids=str)
def test_same_bits_on_any_number_of_threads(shape, layout):
    case = draw(shape, layout)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y, mean, scale, grads = results(case, True, True)
            found.append((y, mean, scale, *grads))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_twin(relu, dtype):
    """The twin, which works on CUDA, says the same; in float64 as autograd does."""
    x, residual, grad, weight, bias = draw((8, 6, 5, 3), dtype=dtype)
    y, mean, scale = reference.batch_norm(x, residual, weight, bias, eps=EPS, relu=relu)
    grads = reference.batch_norm_backward(
        grad, x, y, weight, mean, scale, relu=relu, residual=True
    )
    case = x, residual, grad, weight, bias
    passes = (y > 0).double() if relu else torch.ones(())
    full, mu, sigma, expected = truths(case, passes, True)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    wanted = (full.relu() if relu else full, mu, sigma, *expected)
    for got, want in zip((y, mean, scale, *grads), wanted, strict=True):
        assert error(got, want, want.norm()) <= bound
    without = reference.batch_norm_backward(grad, x, y, None, mean, scale, relu=relu)
    assert without[1].numel() == 0


def test_opcheck():
    op = torch.ops.fisherprune
    for layout in ("contiguous", "samples_innermost", "gaps"):
        x, residual, grad, weight, bias = draw((4, 3, 5, 5), layout)
        for tensors in ((x, residual, weight, bias), (x, None, None, None)):
            leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
            opcheck(op.batch_norm, (*leaves, EPS, True))
            y, mean, scale = op.batch_norm(*tensors, EPS, True)
            has = tensors[1] is not None
            arguments = (grad, x, y, tensors[2], mean, scale, True, has)
            opcheck(op.batch_norm_backward, arguments)


def test_the_result_may_be_changed_in_place():
    x = LAYOUTS["samples_innermost"](torch.randn(6, 3, 4, 4)).requires_grad_()
    y, _, _ = ops.batch_norm(x)
    (want,) = torch.autograd.grad(y.relu().square().sum(), x)
    y, _, _ = ops.batch_norm(x)
    (got,) = torch.autograd.grad(y.relu_().square().sum(), x)
    assert torch.equal(got, want)


def test_only_wanted_gradients():
    x, residual, grad, weight, _ = draw((4, 3, 5, 5))
    weight.requires_grad_()
    y, mean, scale = ops.batch_norm(x, residual, weight, relu=True)
    assert not mean.requires_grad and not scale.requires_grad
    y.backward(grad)
    assert weight.grad is not None and x.grad is None


def test_second_derivatives_are_refused():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y, _, _ = ops.batch_norm(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(FisherpruneError, match="batch_norm: there are no second deriv"):
        first.sum().backward()


X = torch.randn(4, 3, 5, 5)
C = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.batch_norm(X[0, 0, 0]),
         "batch_norm: input must have shape [N, C, *], got [5]"),
        (lambda: ops.batch_norm(X[:0]),
         "batch_norm: input must have at least one entry, got [0, 3, 5, 5]"),
        (lambda: ops.batch_norm(X.double()),
         "batch_norm: input must be float32, float16 or bfloat16, got Double"),
        (lambda: ops.batch_norm(X.half()),
         "batch_norm: input must be float32 or bfloat16, got Half"),
        (lambda: ops.batch_norm(X, X[:1]),
         "batch_norm: residual must have the shape of input, [4, 3, 5, 5], "
         "got [1, 3, 5, 5]"),
        (lambda: ops.batch_norm(X, X.bfloat16()),
         "batch_norm: residual must have the dtype of input, Float, got BFloat16"),
        (lambda: ops.batch_norm(X, None, C[:2]),
         "batch_norm: weight must have shape [3], got [2]"),
        (lambda: ops.batch_norm(X, bias=C[:2]),
         "batch_norm: bias must have shape [3], got [2]"),
        (lambda: ops.batch_norm(X, bias=C.double()),
         "batch_norm: bias must be a contiguous float32 tensor"),
        (lambda: ops.batch_norm(X, eps=-1e-5),
         "batch_norm: eps must be at least 0, got -1e-05"),
        (lambda: ops.batch_norm_backward(X[:1], X, X, None, C, C),
         "batch_norm_backward: grad must have the shape of input, [4, 3, 5, 5], "
         "got [1, 3, 5, 5]"),
        (lambda: ops.batch_norm_backward(X, X, X[:1], None, C, C),
         "batch_norm_backward: output must have the shape of input, [4, 3, 5, 5], "
         "got [1, 3, 5, 5]"),
        (lambda: ops.batch_norm_backward(X, X, X, C[:1], C, C),
         "batch_norm_backward: weight must have shape [3], got [1]"),
        (lambda: ops.batch_norm_backward(X, X, X, None, C[:1], C),
         "batch_norm_backward: mean must have shape [3], got [1]"),
        (lambda: ops.batch_norm_backward(X, X, X, None, C, C[:1]),
         "batch_norm_backward: scale must have shape [3], got [1]"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value) == message
