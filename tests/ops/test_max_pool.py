"""max_pool2d on the CPU: equal to PyTorch's, its layout and its errors."""

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


def innermost(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


LAYOUTS = {
    "samples_innermost": innermost,
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gaps": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}

CASES = {
    # shape, kernel, stride, padding, ceil_mode
    "vgg": ((40, 3, 8, 8), (2, 2), (2, 2), (0, 0), True),
    "odd_up": ((7, 2, 5, 7), (2, 2), (2, 2), (0, 0), True),
    "odd_down": ((7, 2, 5, 7), (2, 2), (2, 2), (0, 0), False),
    "resnet": ((33, 3, 9, 8), (3, 3), (2, 2), (1, 1), False),
    "overlapping": ((5, 2, 6, 9), (3, 5), (1, 2), (1, 2), False),
    "sparse": ((16, 2, 9, 9), (2, 1), (4, 3), (1, 0), True),
    "whole": ((3, 4, 6, 5), (6, 5), (1, 1), (0, 0), False),
    "one": ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), False),
    "one_image": ((1, 3, 9, 70), (2, 2), (2, 2), (0, 0), False),
    "one_image_padded": ((1, 2, 10, 75), (3, 3), (2, 2), (1, 1), True),
    "one_image_apart": ((1, 2, 8, 80), (2, 4), (2, 3), (1, 2), True),
    "one_image_side_by_side": ((1, 2, 7, 39), (3, 2), (1, 1), (1, 0), False),
    "no_samples": ((0, 2, 4, 4), (2, 2), (2, 2), (0, 0), False),
}


def assert_right(x, options):
    """Compare with PyTorch: maxima exactly, gradients, where they meet, in float64."""
    own = x.detach().requires_grad_()
    y, index = ops.max_pool2d(own, *options)
    kernel, stride, padding, ceil_mode = options
    truth = x.detach().double().requires_grad_()
    want = F.max_pool2d(truth, kernel, stride, padding, ceil_mode=ceil_mode)
    assert y.dtype == x.dtype and y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, reference.max_pool2d(x.double(), *options)[1])
    grad = torch.randn(y.shape).to(x.dtype)
    (got,) = torch.autograd.grad(y, own, grad)
    (expected,) = torch.autograd.grad(want, truth, grad.double())
    bound = 1e-6 if x.dtype == torch.float32 else 2**-8
    assert (got - expected).norm() <= bound * expected.norm()
    twin = reference.max_pool2d_backward(grad.double(), index, x.shape, *options)
    torch.testing.assert_close(twin, expected)
    for result in (y, index, got):
        assert result.stride() == innermost(result).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name, layout, dtype):
    shape, *options = CASES[name]
    assert_right(LAYOUTS[layout](torch.randn(shape).to(dtype)), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_ties_infinities_and_what_is_no_number(name, dtype):
    """The first of equal ones; behind a ReLU most are."""
    shape, *options = CASES[name]
    values = torch.tensor([0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan")])
    for kinds in (2, 3, 5, 6):
        x = values[torch.randint(kinds, shape)].to(dtype)
        assert_right(innermost(x), options)
    assert_right(innermost(torch.full(shape, -float("inf"))), options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_window_equals_pytorch(data):
    def pair(least, most):
        return data.draw(st.tuples(*[st.integers(least, most)] * 2))

    kernel = pair(1, 5)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    least = [max(1, k - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    size = [data.draw(st.integers(at_least, 12)) for at_least in least]
    n, c = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    options = (kernel, pair(1, 6), tuple(padding), data.draw(st.booleans()))
    assert_right(innermost(torch.randn(n, c, *size)), options)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_equals_pytorch(capability):
    run_with(
        capability,
        __file__,
        "for name in CASES:\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        test_equals_pytorch(name, 'samples_innermost', dtype)",
    )


def test_same_bits_on_any_number_of_threads():
    x = innermost(torch.randn(20, 5, 30, 30)).requires_grad_()
    grad, before, found = torch.randn(20, 5, 15, 15), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y, index = ops.max_pool2d(x, (3, 3), (2, 2), (1, 1))
            found.append([y, index, *torch.autograd.grad(y, x, grad)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_windows_side_by_side_by_default():
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(ops.max_pool2d(x, (2, 3))[0], F.max_pool2d(x, (2, 3)))
    got, want = reference.max_pool2d(x, (2, 3)), ops.max_pool2d(x, (2, 3))
    assert all(map(torch.equal, got, want))


def test_the_result_may_be_changed_in_place():
    x = torch.randn(3, 2, 6, 6, requires_grad=True)
    y, _ = ops.max_pool2d(x, (2, 2))
    y.relu_().sum().backward()
    wanted = torch.autograd.grad(F.max_pool2d(x, 2).relu().sum(), x)
    assert torch.equal(x.grad, *wanted)


def test_opcheck():
    op = torch.ops.fisherprune
    for x in (torch.randn(5, 3, 6, 7), innermost(torch.randn(5, 3, 6, 7))):
        options = (3, 2), (2, 1), (1, 1), True
        opcheck(op.max_pool2d, (x.requires_grad_(), *options))
        y, index = op.max_pool2d(x.detach(), *options)
        opcheck(op.max_pool2d_backward, (y, index, x.shape, *options))


def test_second_derivatives_are_refused():
    x = torch.randn(4, 3, 4, 4, requires_grad=True)
    y, index = ops.max_pool2d(x, (2, 2))
    assert not index.requires_grad
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(FisherpruneError, match="max_pool2d: there are no second deriv"):
        first.sum().backward()


def test_bytes_that_are_no_places_write_nothing_outside_of_the_image():
    x, options = torch.randn(1, 4, 6, 6), ((3, 3), (2, 2), (1, 1))
    y, index = ops.max_pool2d(x, *options)
    grad, back = torch.ones_like(y), torch.ops.fisherprune.max_pool2d_backward
    for byte in (0, 9, 255):
        found = back(grad, torch.full_like(index, byte), x.shape, *options)
        assert 0 <= found.sum() <= grad.sum()
    assert back(grad, index, x.shape, *options).sum() == grad.sum()


X = torch.randn(2, 3, 4, 5)
BYTES = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)


def backward(grad=X[:, :, :2, :2], index=BYTES, size=(2, 3, 4, 5), kernel=(2, 2)):
    return torch.ops.fisherprune.max_pool2d_backward(
        grad, index, size, kernel, kernel, (0, 0)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.max_pool2d(X[0], (2, 2)),
         "max_pool2d: input must have shape [N, C, H, W], got [3, 4, 5]"),
        (lambda: ops.max_pool2d(X.double(), (2, 2)),
         "max_pool2d: input must be float32, float16 or bfloat16, got Double"),
        (lambda: ops.max_pool2d(X.half(), (2, 2)),
         "max_pool2d: entries must be float32 or bfloat16, got Half"),
        (lambda: ops.max_pool2d(X, (0, 2)),
         "max_pool2d: kernel must be two integers of at least 1"),
        (lambda: ops.max_pool2d(X, (2, 2), (1, 0)),
         "max_pool2d: stride must be two integers of at least 1"),
        (lambda: ops.max_pool2d(X, (2, 2), (1, 2**61)),
         f"max_pool2d: stride must be at most {2**60}, got {2**61}"),
        (lambda: ops.max_pool2d(X, (2, 2), padding=(0, -1)),
         "max_pool2d: padding must be two integers of at least 0"),
        (lambda: ops.max_pool2d(X, (3, 3), padding=(1, 2)),
         "max_pool2d: padding must be at most half of kernel, 3, got 2"),
        (lambda: ops.max_pool2d(X, (16, 16)),
         "max_pool2d: kernel must have at most 255 places, got 16 x 16"),
        (lambda: ops.max_pool2d(X, (5, 2)),
         "max_pool2d: kernel must fit into the padded input, 4, got 5"),
        (lambda: ops.max_pool2d(X[:, :, :0], (2, 2), padding=(1, 1)),
         "max_pool2d: input must have at least one row and column"),
        (lambda: backward(grad=X),
         "max_pool2d_backward: grad must have shape [2, 3, 2, 2], got [2, 3, 4, 5]"),
        (lambda: backward(index=BYTES.int()),
         "max_pool2d_backward: index must be uint8 in the shape of grad, [2, 3, 2, 2], "
         "got [2, 3, 2, 2]"),
        (lambda: backward(size=(2, 3, 4)),
         "max_pool2d_backward: input_size must be four integers"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (4, 2)])
def test_windows_larger_than_the_image_where_they_may_end_outside(size):
    x = torch.randn(3, 2, *size)
    expected = F.max_pool2d(x, 3, 2, 0, ceil_mode=True)
    assert torch.equal(ops.max_pool2d(x, (3, 3), (2, 2), (0, 0), True)[0], expected)
    with pytest.raises(RuntimeError, match="kernel must fit into the padded input"):
        ops.max_pool2d(x, (3, 3), (2, 2), (0, 0), False)
