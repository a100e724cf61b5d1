"""Sparse layers compute what the masked dense ones do, whatever the layer."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherprune as fp
from fisherprune.sparse import SparseConv1d, SparseConv2d, SparseLinear

ints = st.integers


def masked_copy(dense, mask):
    """Return a float64 copy with zeros."""
    true = copy.deepcopy(dense).double()
    with torch.no_grad():
        true.weight[~mask] = 0
    return true


def assert_close(found, true):
    """Compare by the norm of the error; a sum of few terms may cancel out."""
    scale = max(float(true.norm()), true.numel() ** 0.5)
    assert float((found.double() - true).norm()) <= 1e-5 * scale


def assert_same(kind, dense, mask, x):
    """Compare output and gradients with the masked layer in float64."""
    sparse, true = kind(dense, mask), masked_copy(dense, mask)
    x, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    out, expected = sparse(x), true(exact)
    assert out.shape == expected.shape
    assert_close(out.detach(), expected.detach())
    grad = torch.randn(out.shape)
    out.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, exact.grad)
    assert_close(sparse.values.grad, true.weight.grad[mask])
    if dense.bias is not None:
        assert_close(sparse.bias.grad, true.bias.grad)


def masks_for(weight, density):
    return torch.rand(weight.shape) < density


densities = st.sampled_from([0.0, 0.05, 0.3, 1.0])


@st.composite
def conv_options(draw, dims):
    """Draw what a convolution takes, and the shape of an input of it."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    axes = [
        dict(k=draw(ints(1, 4)), s=draw(ints(1, 3)), d=draw(ints(1, 2)))
        for _ in range(dims)
    ]
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    if padding == "numbers":
        padding = tuple(draw(ints(0, 3)) for _ in range(dims))
    channels = groups * draw(ints(1, 4))
    shape = [channels, *(draw(ints(7, 10)) for _ in range(dims))]
    shape = shape if draw(st.booleans()) else [draw(ints(1, 6)), *shape]
    return shape, dict(
        in_channels=channels,
        out_channels=groups * draw(ints(1, 5)),
        kernel_size=tuple(a["k"] for a in axes),
        stride=1 if padding == "same" else tuple(a["s"] for a in axes),
        dilation=tuple(a["d"] for a in axes),
        padding=padding,
        groups=groups,
        bias=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(conv_options(2), densities)
def test_any_conv2d(case, density):
    shape, options = case
    dense = nn.Conv2d(**options)
    mask = masks_for(dense.weight, density)
    assert_same(SparseConv2d, dense, mask, torch.randn(shape))


@settings(max_examples=60)
@given(conv_options(1), densities)
def test_any_conv1d(case, density):
    shape, options = case
    dense = nn.Conv1d(**options)
    mask = masks_for(dense.weight, density)
    assert_same(SparseConv1d, dense, mask, torch.randn(shape))


@settings(max_examples=40)
@given(
    st.lists(ints(0, 4), max_size=3), ints(1, 40), ints(1, 30), st.booleans(), densities
)
def test_any_linear(positions, width, outputs, bias, density):
    dense = nn.Linear(width, outputs, bias=bias)
    mask = masks_for(dense.weight, density)
    assert_same(SparseLinear, dense, mask, torch.randn(*positions, width))


def test_linear_takes_any_strides():
    dense = nn.Linear(6, 4)
    x = torch.randn(6, 5, 3).permute(2, 1, 0)
    assert_same(SparseLinear, dense, masks_for(dense.weight, 0.5), x.detach())


LAYERS = {
    "conv2d": (SparseConv2d, nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "conv1d": (SparseConv1d, nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 7)),
    "linear": (SparseLinear, nn.Linear(8, 5), (3, 8)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """Return a sparse layer, its dense one with zeros, and an input."""
    kind, dense, shape = LAYERS[request.param]
    dense = copy.deepcopy(dense)
    mask = masks_for(dense.weight, 0.3)
    dense.weight.data[~mask] = 0
    return kind(dense, mask), dense, torch.randn(shape)


def test_the_dense_weight_is_read(layer):
    sparse, dense, _ = layer
    assert torch.equal(sparse.weight, dense.weight)
    assert torch.equal(sparse.mask(), dense.weight != 0)
    flat = dense.weight.flatten()
    assert torch.equal(flat[sparse.places()], sparse.values)
    assert sparse.density() == pytest.approx(
        dense.weight.count_nonzero().item() / dense.weight.numel()
    )
    with pytest.raises(KeyError, match="weight"):
        sparse.weight = nn.Parameter(torch.zeros(1))
    assert f"{sparse.values.numel()} of" in repr(sparse)


def test_relu(layer):
    sparse, dense, x = layer
    fused = type(sparse)(dense, sparse.mask(), relu=True)
    assert torch.equal(fused(x), sparse(x).relu())
    assert "relu=True" in repr(fused) and "relu" not in repr(sparse)
    lower = copy.deepcopy(fused).double()
    torch.testing.assert_close(lower(x.double()).float(), fused(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_run(layer, dtype):
    sparse, dense, x = (copy.deepcopy(each).to(dtype) for each in layer)
    assert sparse.values.dtype == dtype and sparse.rows.dtype == torch.int32
    torch.testing.assert_close(sparse(x), dense(x))


def test_float64_has_gradients_of_any_order():
    dense = nn.Conv2d(2, 3, 2).double()
    sparse = SparseConv2d(dense, masks_for(dense.weight, 0.5))
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    values, bias = (p.detach().requires_grad_() for p in sparse.parameters())

    def run(x, values, bias):
        parameters = {"values": values, "bias": bias}
        return torch.func.functional_call(sparse, parameters, (x,))

    assert torch.autograd.gradcheck(run, (x, values, bias))
    assert torch.autograd.gradgradcheck(run, (x, values, bias))


def test_autocast(layer):
    sparse, dense, x = layer
    x = torch.cat([x] * 40).requires_grad_()  # whole chunks, and a rest
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = sparse(x), dense(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, sparse(x.bfloat16().float()).bfloat16())
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    found.square().sum().backward()
    grads = [each.grad for each in (x, *sparse.parameters())]
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(sparse(x), sparse(x.detach()))
        assert sparse(x.bfloat16()).dtype == torch.float32


def test_the_output_may_be_changed_in_place(layer):
    sparse, dense, x = layer
    grads = []
    for each in (sparse, dense):
        each(x).relu_().square().sum().backward()
        grads.append(each.bias.grad.clone())
        each.bias.grad = None
    torch.testing.assert_close(*grads)


def test_copies_are_whole(layer):
    sparse, _, x = layer
    expected, file = sparse(x), io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(x), expected)
        assert copied.values is not sparse.values
        assert [*copied.state_dict()] == [*sparse.state_dict()]


def test_own_state(layer):
    sparse, _, x = layer
    other = copy.deepcopy(sparse)
    nn.init.normal_(other.values)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), sparse(x))


def test_state_of_another_pattern_is_refused(layer):
    sparse, dense, _ = layer
    mask = sparse.mask()
    other = type(sparse)(dense, mask.flatten().roll(1).view(mask.shape))
    with pytest.raises(RuntimeError, match="'columns' must be those of the masks"):
        other.load_state_dict(sparse.state_dict())


def test_state_of_the_dense_layer(layer):
    sparse, dense, x = layer
    other = copy.deepcopy(sparse)
    nn.init.normal_(other.values)
    given = dense.state_dict()
    assert other.load_state_dict(given) == ([], [])
    assert torch.equal(other(x), sparse(x))
    assert [*given] == ["weight", "bias"]


def test_dense_state_that_does_not_fit(layer):
    sparse, dense, _ = layer
    state = dense.state_dict()
    with pytest.raises(
        RuntimeError, match="'weight' must be zero where the mask keeps nothing, got "
    ):
        sparse.load_state_dict(state | {"weight": torch.ones_like(dense.weight)})
    with pytest.raises(RuntimeError, match="'weight' must have shape .*, got .1."):
        sparse.load_state_dict(state | {"weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="Missing key.*values"):
        sparse.load_state_dict({"bias": state["bias"]})


def test_to_dense_is_the_way_back(layer):
    sparse, dense, x = layer
    sparse.eval()
    sparse(x).sum().backward()
    before = torch.get_rng_state()
    back = sparse.to_dense()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(back) is type(dense) and repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight) and back.bias is sparse.bias
    assert torch.equal(back.weight.grad[sparse.mask()], sparse.values.grad)
    assert not back.training
    torch.testing.assert_close(back(x), sparse(x))


def test_on_the_meta_device(layer):
    sparse, dense, x = layer
    assert sparse.to("meta")(x.to("meta")).shape == dense(x).shape


def test_what_layers_refuse():
    conv, linear = nn.Conv2d(2, 3, 3), nn.Linear(4, 2)
    error = fp.FisherpruneError
    with pytest.raises(error, match="SparseConv2d: dense must be a Conv2d, got Linear"):
        SparseConv2d(linear, torch.ones(2, 4) > 0)
    with pytest.raises(error, match="SparseLinear: mask must be a bool tensor, got"):
        SparseLinear(linear, torch.ones(2, 4))
    with pytest.raises(error, match=r"mask must be of shape \[2, 4\], got \[4, 2\]"):
        SparseLinear(linear, torch.ones(4, 2) > 0)
    around = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    with pytest.raises(error, match="padding_mode must be 'zeros', got 'circular'"):
        SparseConv2d(around, around.weight > 0)
    sparse = SparseConv2d(conv, conv.weight > 0)
    for shape in ([2, 3, 5, 5], [2, 5], [5, 5]):
        with pytest.raises(error, match=r"SparseConv2d: input must be of shape \[N, 2"):
            sparse(torch.zeros(shape))
    conv = nn.Conv1d(2, 3, 3)
    with pytest.raises(error, match=r"SparseConv1d: input must be of shape \[N, 2, L"):
        SparseConv1d(conv, conv.weight > 0)(torch.zeros(4, 3, 5))
    with pytest.raises(error, match=r"SparseLinear: input must be of shape \[\*, 4\]"):
        SparseLinear(linear, linear.weight > 0)(torch.zeros(3))


def test_compiled_and_exported(layer):
    sparse, _, x = layer
    expected = sparse(x)
    exported = torch.export.export(
        sparse, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    torch.testing.assert_close(exported.module()(x), expected)
    longer = torch.cat([x, x])
    torch.testing.assert_close(exported.module()(longer), sparse(longer))
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), sparse.values)
    (true,) = torch.autograd.grad(expected.square().sum(), sparse.values)
    torch.testing.assert_close(grad, true)
