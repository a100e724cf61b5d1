"""Compressed networks under autocast: images in bfloat16, from layer to layer."""

import copy

import pytest
import torch
from sparse_nets import case, doubled, loss_of, masked
from torch import nn

import fisherprune as fp
from fisherprune import sparse
from fisherprune.ops.layout import lies_innermost
from fisherprune.sparse.cost import pays

HALF = torch.bfloat16


def gradients(model, x, y, amp):
    """Return the loss and the gradients of all parameters by name."""
    with torch.autocast("cpu", HALF, enabled=amp):
        loss = loss_of(model, x, y)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def errors(found, true):
    """Return the relative error of all gradients together, and of the loss."""
    names = found.keys() - {"loss"}
    error = sum(float((found[n].double() - true[n]).square().sum()) for n in names)
    scale = sum(float(true[n].square().sum()) for n in names)
    loss = float((found["loss"] - true["loss"]).abs() / true["loss"])
    return (error / scale) ** 0.5, loss


def sparse_gradients(model, found):
    """Return gradients by the names of a dense model, zeros where nothing is kept."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "values")}
    dense = {n: g for n, g in found.items() if not n.endswith(".values")}
    for name, layer in layers.items():
        grad = torch.zeros(layer.shape).flatten()
        grad[layer.places()] = found[f"{name}.values"]
        dense[f"{name}.weight"] = grad.view(layer.shape)
    return dense


def are_as_near(name, samples):
    """Return whether gradients of a network just drawn are as near to float64."""
    model, masks, x, y = case(name, samples=samples, density=0.3)
    model.train()
    dense = masked(model, masks)
    true = gradients(doubled(dense), x.double(), y, amp=False)
    theirs = gradients(copy.deepcopy(dense), x, y, amp=True)
    with torch.autocast("cpu", HALF):
        sparse.compress(model, masks, dense_above=1.0)
    ours = sparse_gradients(model, gradients(model, x, y, amp=True))
    assert all(each.dtype == torch.float32 for each in ours.values())
    for name, mask in masks.items():
        for found in (true, theirs):
            found[name] = found[name] * mask
    pairs = zip(errors(ours, true), errors(theirs, true), strict=True)
    return all(one <= 3 * other + 2**-5 for one, other in pairs)


@pytest.mark.parametrize("samples", [32, 37])
@pytest.mark.parametrize("name", ["conv", "sequence", "twice", "resnet"])
def test_gradients_are_as_near_to_float64_as_those_of_dense_layers(name, samples):
    """A ReLU of one draw may round to its other side, those of all draws do not."""
    assert any(are_as_near(name, samples) for _ in range(4))


def test_images_stay_in_bfloat16_with_samples_innermost():
    model, masks, x, y = case("resnet", samples=64)
    with torch.autocast("cpu", HALF):
        sparse.compress(model.train(), masks, dense_above=1.0)
    seen = []

    def note(module, args, output):
        images = args[0], output
        seen.append(all(lies_innermost(t) and t.dtype == HALF for t in images))

    kinds = sparse.BatchNorm | sparse.SparseConv2d
    first = next(m for m in model.modules() if isinstance(m, sparse.SparseConv2d))
    for module in model.modules():
        if isinstance(module, kinds) and module is not first:
            module.register_forward_hook(note)
    gradients(model, x, y, amp=True)
    assert len(seen) > 30 and all(seen)


def test_dense_layers_between_sparse_ones():
    """They copy images there and back; their results are those of a dense model."""
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 5)),
    )
    masks = fp.Masks(
        {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.2 for i in (0, 7)}
    )
    x, y = torch.randn(48, 8, 8, 8), torch.randint(5, (48,))
    dense = masked(model, masks)
    true = gradients(doubled(dense), x.double(), y, amp=False)
    theirs = gradients(dense, x, y, amp=True)
    sparse.compress(model, masks)
    assert type(model[3]) is sparse.Conv2d
    ours = sparse_gradients(model, gradients(model, x, y, amp=True))
    for name, mask in masks.items():
        for found in (true, theirs):
            found[name] = found[name] * mask
    for one, other in zip(errors(ours, true), errors(theirs, true), strict=True):
        assert one <= 3 * other + 2**-5


def test_a_residual_in_float32_is_added_in_float32():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = sparse.SparseConv2d(conv, torch.rand(conv.weight.shape) < 0.3)
    x, residual = torch.randn(33, 4, 7, 7), torch.randn(33, 6, 7, 7)
    with torch.autocast("cpu", HALF):
        out, plain = layer(x, residual), layer(x)
        rounded = layer(x, residual.to(HALF), relu=True)
    assert out.dtype == torch.float32 and torch.equal(out, plain + residual)
    exact = layer(x.to(HALF).float(), residual.to(HALF).float(), relu=True)
    assert torch.equal(rounded, exact.to(HALF))


def test_what_pays_depends_on_the_context():
    """A choice for bfloat16 is made where compress runs under autocast."""
    layer = nn.Linear(1000, 100)
    densities = [i / 100 for i in range(100)]
    bounds = {
        dtype: max(d for d in densities if pays(layer, d, dtype))
        for dtype in (torch.float32, HALF)
    }
    for dtype, bound in bounds.items():
        for density in (bound - 0.02, bound + 0.02):
            model = nn.Sequential(copy.deepcopy(layer))
            kept = torch.arange(100_000).view(100, 1000) < density * 100_000
            others = torch.eye(100) > 0
            model.append(nn.Linear(100, 100))
            masks = {"0.weight": kept, "1.weight": others}
            with torch.autocast("cpu", HALF, enabled=dtype == HALF):
                sparse.compress(model, masks)
            found = isinstance(model[0], sparse.SparseLinear)
            assert found == (density < bound)


def test_compiled_under_autocast():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = sparse.SparseConv2d(conv, torch.rand(conv.weight.shape) < 0.3)
    x, grad = torch.randn(40, 4, 7, 7), torch.randn(40, 6, 7, 7).to(HALF)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (compiled, layer):
        with torch.autocast("cpu", HALF):
            out = run(x)
        results.append([out, *torch.autograd.grad(out, [*layer.parameters()], grad)])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)
