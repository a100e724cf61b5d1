"""channel_affine_backward on the CPU: against float64, its bits and its errors."""

import pytest
import torch
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fisherprune import ops
from fisherprune.ops import reference

SHAPES = [
    (7, 5, 3, 3),
    (2, 3, 70, 70),
    (33, 17, 2, 2),
    (20, 30),
    (9, 4, 21),
    (3, 2, 3, 4, 5),
    (0, 3, 4),
    (3, 4, 0),
    (1, 1, 100, 1000),
]


def operands(shape, mean=1.0, last=False):
    pair = torch.randn(2, *shape).unbind()
    if last:
        pair = tuple(map(channels_last, pair))
    return pair + torch.randn(3, shape[1]).mul(mean).unbind()


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def assert_right(grad, input, mean, scale, factor):
    """Compare; what may cancel, on the scale of what it is the sum of."""
    given = grad, input, mean, scale, factor
    found = ops.channel_affine_backward(*given)
    wide = [t.double() for t in given]
    expected = reference.channel_affine_backward(*wide)
    positive = [t.abs() for t in wide]
    positive[2] = -positive[2]  # what is subtracted
    sizes = reference.channel_affine_backward(*positive)
    assert found[0].stride() == input.stride()
    for got, want, size in zip(found, expected, sizes, strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        assert (got - want).norm() <= 3e-7 * size.norm()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, last):
    assert_right(*operands(shape, last=last))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    c=st.integers(1, 20) | st.integers(50, 200),
    positions=st.lists(st.integers(1, 23), max_size=3),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    last=st.booleans(),
)
def test_any_shape_equals_float64(n, c, positions, mean, last):
    assert_right(*operands((n, c, *positions), mean, last))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_equals_float64(capability):
    code = "for shape in SHAPES: [test_equals_float64(shape, last) for last in (0, 1)]"
    run_with(capability, __file__, code)


def test_a_gradient_that_lies_otherwise_is_copied():
    grad, input, *rest = operands((3, 21, 5, 4))
    expected = ops.channel_affine_backward(grad, input, *rest)
    for other in (channels_last(grad), grad.mT.contiguous().mT):
        found = ops.channel_affine_backward(other, input, *rest)
        assert all(map(torch.equal, found, expected))
    assert_right(grad, channels_last(input), *rest)


def test_is_what_autograd_finds():
    """Of BatchNorm in eval mode, of each sample."""
    norm = torch.nn.BatchNorm2d(4).double().eval()
    for each in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(each)
    norm.running_var.uniform_(0.5, 2)
    x, grad = torch.randn(2, 5, 4, 3, 3).double().unbind()
    scale = (norm.running_var + norm.eps).rsqrt()
    given = grad, x, norm.running_mean, scale, scale * norm.weight.detach()
    found = ops.channel_affine_backward(*(t.float() for t in given))
    x.requires_grad_()
    for i in range(len(x)):
        two = x[[i, i]]  # a lone sample's gradient is wrong where it is expanded
        outputs = norm(two)[:1]
        wanted = torch.autograd.grad(
            outputs, [x, norm.weight, norm.bias], grad[i : i + 1]
        )
        torch.testing.assert_close(found[0][i], wanted[0][i].float())
        torch.testing.assert_close(found[1][i], wanted[1].float())
        torch.testing.assert_close(found[2][i], wanted[2].float())


@pytest.mark.parametrize("last", [False, True])
def test_threads_do_not_change_a_bit(last):
    given, before = operands((9, 31, 40, 40), last=last), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.channel_affine_backward(*given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 40)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(shape, last):
    opcheck(torch.ops.fisherprune.channel_affine_backward, operands(shape, last=last))


def test_bad_operands_are_refused():
    grad, input, mean, scale, factor = operands((3, 4, 5))
    rest = mean, scale, factor
    cases = [
        ((grad[:2], input, *rest), "grad must have the input's shape"),
        ((grad, input.double(), *rest), "input must be a float32 tensor"),
        ((grad.double(), input, *rest), "grad must be a float32 tensor"),
        ((grad, input[:1].expand(3, 4, 5), *rest), "input must be contiguous or have"),
        (
            (grad, input, mean[:3], scale, factor),
            "mean must be contiguous and have one",
        ),
        ((grad, input, mean, scale, factor[:, None]), "factor must be contiguous"),
        ((mean, mean, *rest), r"input must have shape \[N, C, \*\]"),
    ]
    for wrong, text in cases:
        with pytest.raises(RuntimeError, match=f"channel_affine_backward: {text}"):
            ops.channel_affine_backward(*wrong)
