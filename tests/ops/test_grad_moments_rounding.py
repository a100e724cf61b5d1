"""What rounds in grad_moments, what must not, and what is not finite."""

import pytest
import torch
from moment_cases import CASES, make
from moment_checks import assert_right, error, moments

from fisherprune import ops
from fisherprune.ops import reference


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


@pytest.mark.parametrize("size", [1, 1e-18])
def test_products_that_cancel_leave_no_rounding(size):
    """Two tiles' products cancel, so that no error is small beside what is left."""
    shape = dict(n=1, c=64, o=64, size=(12, 12), kernel=(3, 3), padding=(1, 1))
    input, grad, weight, options = make(**shape)
    input[:], grad[:] = 0, 0
    input[..., 0, 1], grad[..., 2, 3] = torch.randn(2, 64)
    input[..., 4, 5], grad[..., 6, 7] = input[..., 0, 1], -grad[..., 2, 3]
    input[..., 11, 11] = grad[..., 11, 11] = 1e-3  # these meet
    found = torch.zeros(2, *weight)
    ops.grad_moments(input * size, grad * size, *found, **options)
    found[..., 1, 1] = 0
    assert not found.any()


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
