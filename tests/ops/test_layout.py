"""Images made of others that lie otherwise in memory, and the op behind them."""

import pytest
import torch
from capabilities import CAPABILITIES, run_with
from torch.library import opcheck

from fisherprune.ops.layout import (
    contiguous,
    lies_innermost,
    lying_as,
    samples_innermost,
)

MATRICES = [
    *[(1, 1), (1, 40), (40, 1), (16, 16), (17, 33), (64, 64), (65, 1025), (128, 2050)],
    *[(15, 200), (1100, 17), (16, 70_000), (1024, 1040), (1040, 1024), (0, 5), (5, 0)],
    *[(32, 70_000), (2048, 1025)],
]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(5, 3, 4, 7), (128, 16, 9, 5), (16, 64, 32, 33), (1, 3, 5, 5), (0, 3, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_transpose_equals_pytorchs(shape, dtype):
    matrix = torch.randn(shape).to(dtype)
    found = torch.ops.fisherprune.transpose(matrix)
    assert found.is_contiguous() and torch.equal(found, matrix.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 33), (1040, 1024)], ids=str)
def test_memory_that_begins_anywhere(shape, dtype):
    matrix = torch.randn(shape[0] * shape[1] + 1).to(dtype)[1:].view(shape)
    assert torch.equal(torch.ops.fisherprune.transpose(matrix), matrix.t())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability(capability):
    run_with(
        capability,
        __file__,
        "for shape in MATRICES:\n"
        "    for dtype in DTYPES: test_transpose_equals_pytorchs(shape, dtype)",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape, dtype):
    x = torch.randn(shape).to(dtype)
    y = samples_innermost(x)
    assert torch.equal(x, y) and lies_innermost(y)
    z = contiguous(y)
    assert torch.equal(x, z) and z.is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(samples_innermost(last), x) and torch.equal(contiguous(last), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lying_as_another(dtype):
    x = torch.randn(9, 3, 4, 5).to(dtype)
    forms = x, samples_innermost(x), x.contiguous(memory_format=torch.channels_last)
    for model in forms:
        for given in forms:
            found = lying_as(model, given)
            assert torch.equal(found, x)
            assert found.stride() == model.stride() or model is forms[2]
        assert lying_as(model, model) is model


def test_what_lies_right_is_returned():
    x = torch.randn(5, 3, 4, 7)
    assert contiguous(x) is x
    y = samples_innermost(x)
    assert samples_innermost(y) is y


@pytest.mark.parametrize("function", [contiguous, samples_innermost])
def test_gradients_come_back(function):
    x = samples_innermost(torch.randn(9, 3, 4, 5))
    x = (contiguous(x) if function is samples_innermost else x).requires_grad_()
    y, grad = function(x), torch.randn(9, 3, 4, 5)
    (found,) = torch.autograd.grad(y, x, function(grad))
    assert torch.equal(found, grad) and found.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    matrix = torch.randn(9, 20, dtype=dtype, requires_grad=True)
    opcheck(torch.ops.fisherprune.transpose, (matrix,))


@pytest.mark.parametrize(
    "matrix, got",
    [
        (torch.zeros(3), r"Float of \[3\]"),
        (torch.zeros(3, 2).t(), r"Float of \[2, 3\]"),
        (torch.zeros(3, 2).double(), r"Double of \[3, 2\]"),
    ],
)
def test_refusals(matrix, got):
    wanted = "transpose: matrix must be a contiguous tensor of two axes, of float32 or "
    with pytest.raises(RuntimeError, match=f"{wanted}bfloat16, got {got}"):
        torch.ops.fisherprune.transpose(matrix)
