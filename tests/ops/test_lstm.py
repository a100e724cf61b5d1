"""The op lstm and its gradient on the CPU: against float64, their bits and errors."""

import pytest
import torch
from capabilities import CAPABILITIES, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from fisherprune import ops
from fisherprune.ops import reference

SIZES = {
    "whole_vectors": (16, 5, 64),
    "odd": (13, 6, 37),
    "one": (1, 1, 1),
    "narrow": (35, 3, 3),
    "no_samples": (0, 4, 5),
    "no_steps": (3, 0, 5),
}


def operands(samples, steps, width):
    shapes = [
        (samples, steps, 4 * width),
        (samples, width),
        (samples, width),
        (4 * width, width),
        (4 * width,),
    ]
    drawn = [torch.randn(shape) for shape in shapes]
    drawn[3] *= width**-0.5  # larger ones make rounding errors grow with time
    return drawn


def is_near(found, wanted, bound):
    """Return whether it is; terms that cancel may leave a small number."""
    return (found - wanted).norm() <= bound * (1 + wanted.norm())


def assert_right(ih, h0, c0, weight, bias):
    """Compare with float64, and the gradient with autograd's."""
    found = ops.lstm(ih, h0, c0, weight, bias)
    wide = [t if t is None else t.double() for t in (ih, h0, c0, weight, bias)]
    starts = [t.requires_grad_() for t in wide[:3]]
    expected = reference.lstm(*wide)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        assert is_near(got, want, 1e-6)
    grad, last = torch.randn_like(found[3]), torch.randn_like(c0)
    parts = weight, *found[1:]
    gradients = ops.lstm_backward(grad, last, *parts)
    twins = reference.lstm_backward(
        *(t.detach().double() for t in (grad, last, weight)),
        *(t.detach() for t in expected[1:]),
    )
    ends, ends_grads = [expected[0][:, 1:], expected[1][:, -1]], [grad, last]
    autograds = torch.autograd.grad(
        ends, starts, [g.double() for g in ends_grads], materialize_grads=True
    )
    for got, twin, want in zip(gradients, twins, autograds, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(twin, want)
        assert is_near(got, want, 2e-6)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_equals_float64(name, has_bias):
    *given, bias = operands(*SIZES[name])
    assert_right(*given, bias if has_bias else None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 70), st.booleans())
def test_any_size_equals_float64(samples, steps, width, has_bias):
    *given, bias = operands(samples, steps, width)
    assert_right(*given, bias if has_bias else None)


def test_is_an_lstm_of_pytorch():
    layer = nn.LSTM(5, 7, batch_first=True)
    x, h, c = torch.randn(4, 6, 5), torch.randn(1, 4, 7), torch.randn(1, 4, 7)
    with torch.no_grad():
        outputs, (_, last) = layer(x, (h, c))
        ih = torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
        own = ops.lstm(ih, h[0], c[0], layer.weight_hh_l0, layer.bias_hh_l0)
    torch.testing.assert_close(own[0][:, 1:], outputs)
    torch.testing.assert_close(own[1][:, -1], last[0])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_equals_float64(capability):
    run_with(
        capability, __file__, "for name in SIZES:\n    test_equals_float64(name, True)"
    )


def gates_of(x):
    """Return the sigmoid and the tanh of each entry, as gates are."""
    ih = x.view(-1, 1, 1).expand(-1, 1, 4).contiguous()
    zero = torch.zeros(len(x), 1)
    gates = ops.lstm(ih, zero, zero, torch.zeros(4, 1))[2][:, 0]
    return gates[:, 0], gates[:, 2]


def test_gates_are_right_wherever_they_are():
    """Also where they are tiny; beyond 85 the smallest numbers of float32 begin."""
    x = torch.cat([torch.linspace(-85, 85, 40001), 10.0 ** torch.arange(-30, 0)])
    x = torch.cat([x, -x])
    sigmoid, tanh = gates_of(x)
    for got, want in ((sigmoid, x.double().sigmoid()), (tanh, x.double().tanh())):
        assert ((got - want).abs() <= 4e-7 * want.abs()).all()


def test_infinities_and_what_is_no_number():
    inf = float("inf")
    x = torch.tensor([-inf, inf, float("nan"), -1e30, 1e30, 0.0, -0.0])
    for got, want in zip(gates_of(x), (x.sigmoid(), x.tanh()), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_same_bits_on_any_number_of_threads_and_beside_any_samples():
    ih, h0, c0, weight, bias = operands(45, 4, 30)
    grad, last = torch.randn(45, 4, 30), torch.randn(45, 30)
    before, found = torch.get_num_threads(), []

    def run(rows):
        got = ops.lstm(ih[rows], h0[rows], c0[rows], weight, bias)
        gradients = ops.lstm_backward(grad[rows], last[rows], weight, *got[1:])
        return [*got, *gradients]

    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            found.append(run(slice(None)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    for rows in (slice(7, 8), slice(17, 45), slice(3, 23)):
        for whole, some in zip(found[0], run(rows), strict=True):
            assert torch.equal(whole[rows], some)


def test_opcheck():
    op, (*given, bias) = torch.ops.fisherprune, operands(3, 4, 5)
    tests = "test_schema", "test_faketensor"
    for each in (bias, None):
        opcheck(op.lstm, (*given, each), test_utils=tests)
    found = op.lstm(*given, bias)
    grads = torch.randn(3, 4, 5), torch.randn(3, 5)
    opcheck(op.lstm_backward, (*grads, given[3], *found[1:]), test_utils=tests)


IH, H0, C0, W, B = operands(2, 3, 5)
PARTS = ops.lstm(IH, H0, C0, W, B)[1:]
GRAD = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.lstm(IH[0], H0, C0, W, B),
         "lstm: ih must have shape [N, T, 4H], got [3, 20]"),
        (lambda: ops.lstm(IH[..., 1:], H0, C0, W, B),
         "lstm: ih must have shape [N, T, 4H], got [2, 3, 19]"),
        (lambda: ops.lstm(IH, H0[:1], C0, W, B),
         "lstm: h0 must have shape [2, 5], got [1, 5]"),
        (lambda: ops.lstm(IH, H0, C0[:, 1:], W, B),
         "lstm: c0 must have shape [2, 5], got [2, 4]"),
        (lambda: ops.lstm(IH, H0, C0, W.t(), B),
         "lstm: weight must have shape [20, 5], got [5, 20]"),
        (lambda: ops.lstm(IH, H0, C0, W, B[1:]),
         "lstm: bias must have shape [20], got [19]"),
        (lambda: ops.lstm(IH.double(), H0, C0, W, B),
         "lstm: ih must be a contiguous float32 tensor on the CPU, got Double on cpu"),
        (lambda: ops.lstm(IH, H0, C0, W.t().contiguous().t(), B),
         "lstm: weight must be a contiguous float32 tensor on the CPU, got Float on "
         "cpu"),
        (lambda: ops.lstm_backward(GRAD[0], C0, W, *PARTS),
         "lstm_backward: grad must have shape [N, T, H], got [3, 5]"),
        (lambda: ops.lstm_backward(GRAD, C0[1:], W, *PARTS),
         "lstm_backward: last must have shape [2, 5], got [1, 5]"),
        (lambda: ops.lstm_backward(GRAD, C0, W[1:], *PARTS),
         "lstm_backward: weight must have shape [20, 5], got [19, 5]"),
        (lambda: ops.lstm_backward(GRAD, C0, W, PARTS[0][:, 1:], *PARTS[1:]),
         "lstm_backward: cells must have shape [2, 4, 5], got [2, 3, 5]"),
        (lambda: ops.lstm_backward(GRAD, C0, W, PARTS[0], GRAD, PARTS[2]),
         "lstm_backward: gates must have shape [2, 3, 20], got [2, 3, 5]"),
        (lambda: ops.lstm_backward(GRAD, C0, W, *PARTS[:2], GRAD[:, 1:]),
         "lstm_backward: tanh must have shape [2, 3, 5], got [2, 2, 5]"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value) == message
