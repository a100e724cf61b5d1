"""Products with a weight: by either library they are those of float64."""

import pytest
import torch

from fisherprune import ops

SHAPES = {
    "large": ((300, 128), 130, True),
    "positions": ((3, 5, 7, 200), 111, True),
    "no bias": ((257, 96), 97, False),
    "a row": ((1, 2048), 1200, True),
    "few features": ((70000, 3), 11, True),
    "small": ((4, 5), 6, True),
    "no rows": ((0, 128), 130, True),
    "no features": ((5, 0), 7, True),
}
STRIDES = {
    "as they come": lambda t: t,
    "columns first": lambda t: t.mT.contiguous().mT,
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


def error(found, x, weight, bias):
    exact = x.double() @ weight.double().mT + (0 if bias is None else bias.double())
    return float((found.double() - exact).norm()), float(exact.norm())


def drawn(case):
    shape, out, has_bias = SHAPES[case]
    bias = torch.randn(out) if has_bias else None
    return torch.randn(shape), torch.randn(out, shape[-1]), bias


@pytest.mark.parametrize("onednn", [True, False, None])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("of_input", STRIDES)
@pytest.mark.parametrize("of_weight", STRIDES)
def test_any_shape_and_strides(case, of_input, of_weight, onednn):
    x, weight, bias = drawn(case)
    x, weight = STRIDES[of_input](x), STRIDES[of_weight](weight)
    found = ops.linear(x, weight, bias, onednn=onednn)
    assert found.shape == (*x.shape[:-1], len(weight)) and found.dtype == x.dtype
    difference, size = error(found, x, weight, bias)
    assert difference <= 1e-6 * size


@pytest.mark.parametrize("onednn", [True, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_pytorchs(dtype, onednn):
    x, weight, bias = (t.to(dtype) for t in drawn("large"))
    found = ops.linear(x, weight, bias, onednn=onednn)
    assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("onednn", [True, None])
def test_autocast_and_its_switch_are_pytorchs(onednn):
    x, weight, bias = drawn("large")
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear(x, weight, bias, onednn=onednn)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))
    with torch.backends.mkldnn.flags(enabled=False):
        found = ops.linear(x, weight, bias, onednn=onednn)
        assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))


def test_what_is_no_number_stays_none():
    x, weight, bias = drawn("large")
    x[3, 5] = float("nan")
    x[4, 6] = float("inf")
    found = ops.linear(x, weight, bias, onednn=True)
    assert found[3].isnan().all() and not found[4].isfinite().any()
    assert found[5:].isfinite().all()
