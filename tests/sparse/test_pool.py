"""The module MaxPool2d: PyTorch's results in every case, the layout where it can."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisherprune.sparse.pool import MaxPool2d


def innermost(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("layout", [lambda x: x, innermost], ids=["nchw", "chwn"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=2),
        dict(kernel_size=(2, 3), stride=1),
        dict(kernel_size=3, stride=(2, 1), padding=(1, 0), ceil_mode=True),
        dict(kernel_size=2, dilation=2),
        dict(kernel_size=2, return_indices=True),
        dict(kernel_size=17, padding=8),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str
)
def test_equals_pytorchs(dtype, arguments, layout):
    x = torch.randn(5, 3, 9, 8).to(dtype)
    inputs = [x.clone().requires_grad_(), layout(x).requires_grad_()]
    modules = nn.MaxPool2d(**arguments), MaxPool2d(**arguments)
    want, got = (m(x) for m, x in zip(modules, inputs, strict=True))
    if "return_indices" in arguments:
        assert torch.equal(want[1], got[1])
        want, got = want[0], got[0]
    assert torch.equal(want, got)
    grad = torch.randn_like(x)[:, :, : want.shape[2], : want.shape[3]]
    true = x.detach().double().requires_grad_()
    for y in (want, got, F.max_pool2d(true, **arguments)):
        (y[0] if isinstance(y, tuple) else y).backward(grad.to(y[0].dtype))
    theirs, mine = (
        (each.grad.double() - true.grad).abs().max().item() for each in inputs
    )
    assert mine <= max(theirs, 2**-20 * true.grad.abs().max().item())


def test_the_layout_stays():
    x = innermost(torch.randn(6, 3, 8, 8)).requires_grad_()
    y = MaxPool2d(2)(x)
    assert y.stride() == innermost(y).stride()
    (grad,) = torch.autograd.grad(y, x, innermost(torch.randn(y.shape)))
    assert grad.stride() == x.stride()


def test_images_without_samples():
    assert MaxPool2d(2)(torch.randn(3, 4, 4)).shape == (3, 2, 2)
