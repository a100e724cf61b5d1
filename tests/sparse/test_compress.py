"""compress and decompress: what becomes sparse, and that it computes the same."""

import copy
import io

import pytest
import torch
from nets import Own, data
from sparse_nets import NETS, case, doubled, loss_of, masked, random_masks
from torch import nn

import fisherprune as fp
from fisherprune import sparse
from fisherprune.sparse.base import SparseLayer
from fisherprune.sparse.cost import pays


def kinds_of(model):
    """Return the classes of the modules by name."""
    return {name: type(module).__name__ for name, module in model.named_modules()}


def kept_gradients(model, masks):
    """Return gradients of the kept weights and of all else, by dense names."""
    return {
        n: p.grad[masks[n]] if n in masks else p.grad
        for n, p in model.named_parameters()
    }


def error_of_gradients(name, training):
    """Return the largest relative error over parameters, of a network just drawn."""
    model, masks, x, y = case(name)
    model.train(training)
    true = doubled(masked(model, masks))
    small = sparse.compress(model, masks, fold=False, dense_above=1.0)
    assert small is model and small.training == training
    torch.testing.assert_close(small(x).double(), true(x.double()), rtol=0, atol=1e-4)
    loss_of(small, x, y).backward()
    loss_of(true, x.double(), y).backward()
    expected = kept_gradients(true, masks)
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = [
        (p.grad.double() - expected[found.replace(".values", ".weight")]).norm()
        for found, p in small.named_parameters()
    ]
    return float(torch.stack(errors).max() / size)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_masked_model(name, training):
    """A ReLU of one draw may round to its other side, those of all draws do not."""
    assert any(error_of_gradients(name, training) <= 2e-5 for _ in range(4))


def test_what_becomes_sparse():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.Conv1d(4, 4, 3),
        nn.Linear(4, 4),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv3d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        type("Own", (nn.Linear,), {})(4, 4),
        nn.Embedding(4, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 0),
    )
    masks = {
        f"{i}.weight": torch.rand(model[i].weight.shape) < 0.2
        for i in (0, 1, 2, 3, 4, 5, 6, 7, 9)
    }
    before = {i: model[i].weight for i in (3, 4, 5, 6, 7, 8, 9)}
    sparse.compress(model, masks, dense_above=1.0)
    kinds = [type(module).__name__ for module in model]
    assert kinds[:3] == ["SparseConv2d", "SparseConv1d", "SparseLinear"]
    assert not any(isinstance(module, SparseLayer) for module in model[3:])
    for i, weight in before.items():
        assert model[i].weight is weight
        if i != 8:
            assert not weight[~masks[f"{i}.weight"]].any()


@pytest.mark.parametrize("bound", [None, 0.0, 0.1, 0.5, 1])
def test_too_dense_layers_stay_dense(bound):
    model = nn.Sequential(*[nn.Linear(10, 10) for _ in range(4)])
    masks = {}
    for i, kept in enumerate((0, 10, 25, 51)):
        mask = torch.arange(100) < kept
        masks[f"{i}.weight"] = mask[torch.randperm(100)].view(10, 10)
    sparse.compress(model, masks, dense_above=bound)
    for layer, kept in zip(model, (0, 10, 25, 51), strict=True):
        density = kept / 100
        wanted = pays(nn.Linear(10, 10), density) if bound is None else density <= bound
        assert isinstance(layer, SparseLayer) == wanted


def test_the_default_is_what_pays():
    layer = nn.Linear(10, 10)
    assert pays(layer, 0.0) and pays(layer, 0.05) and not pays(layer, 1.0)


def test_nothing_sparse_is_a_warning():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(fp.FisherpruneWarning, match="compress: no layer becomes sparse"):
        sparse.compress(model, {"0.weight": torch.ones(4, 4) > 0})


def test_collapse_is_a_warning():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(fp.LayerCollapseWarning, match="'0.weight'"):
        sparse.compress(model, {"0.weight": torch.zeros(4, 4) > 0})
    assert torch.equal(model(torch.randn(2, 4)), model[0].bias.expand(2, 4))


def test_layers_that_stay_dense_are_held():
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))
    masks = {
        "0.weight": torch.rand(20, 20) < 0.1,
        "1.weight": torch.rand(20) < 0.5,
        "2.weight": torch.rand(5, 20) < 0.7,
        "0.bias": torch.rand(20) < 0.5,
    }
    sparse.compress(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert type(model[0]).__name__ == "SparseLinear"
    x, y = data((20,))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name in masks:
            assert torch.equal(p == 0, ~masks[name]), name


def test_layers_that_stay_dense_are_held_in_eval_mode_too():
    """Where nothing is folded, the model may be trained on."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    masks = {
        "0.weight": torch.rand(64, 64) < 0.05,
        "2.weight": torch.rand(64, 64) < 0.9,
    }
    model = sparse.compress(model.eval(), masks)
    assert isinstance(model[0], sparse.SparseLinear) and type(model[2]) is nn.Linear
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 64)).sum().backward()
        optimizer.step()
    assert not model[2].weight[~masks["2.weight"]].any()
    assert model[2].weight[masks["2.weight"]].all()


def test_copies_are_held_anew():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))
    masks = {"0.weight": torch.rand(20, 20) < 0.1, "1.weight": torch.rand(5, 20) < 0.7}
    copied = copy.deepcopy(sparse.compress(model, masks))
    hold = sparse.hold_dense(copied, masks)
    assert hold is not None and dict(hold.masks).keys() == {"1.weight"}
    copied[1].weight.data.fill_(1)
    copied(torch.zeros(1, 20))
    assert torch.equal(copied[1].weight == 0, ~masks["1.weight"])
    assert sparse.hold_dense(copied, {"0.weight": masks["0.weight"]}) is None
    with pytest.raises(fp.FisherpruneError, match="hold_dense: the mask of '0.weight'"):
        sparse.hold_dense(copied, masks | {"0.weight": ~masks["0.weight"]})
    with pytest.raises(fp.FisherpruneError, match="no parameter 'x'"):
        sparse.hold_dense(copied, {"x": masks["0.weight"]})


def test_held_models_are_compressed():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))
    masks = fp.Masks(
        {"0.weight": torch.rand(20, 20) < 0.1, "1.weight": torch.rand(5, 20) < 0.7}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold = masks.hold(model, optimizer)
    old = model[0]
    sparse.compress(model, masks, optimizer=optimizer)
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight == 0, ~masks["1.weight"])
    assert [*hold.masks] == ["1.weight"]
    with pytest.raises(
        fp.FisherpruneError,
        match="update: the held parameters must be the model's, but sparse.compress "
        "has replaced '0.weight'",
    ):
        hold.update(masks)
    old(torch.ones(1, 20)).sum().backward()  # what is left of the old layer is free
    assert old.weight.grad.all() and [*old.state_dict()] == ["weight", "bias"]
    hold.remove()


def test_decompress_is_the_way_back():
    model, masks, x, _ = case("conv")
    reference = masked(model, masks)
    back = sparse.decompress(sparse.compress(model, masks, dense_above=1.0))
    assert back is model and kinds_of(back) == kinds_of(reference)
    found, true = back.state_dict(), reference.state_dict()
    assert [*found] == [*true]
    assert all(torch.equal(found[n], true[n]) for n in true)
    with pytest.raises(fp.FisherpruneError, match="decompress: model must be one of"):
        sparse.decompress(model)
    layer = sparse.SparseLinear(nn.Linear(2, 2), torch.eye(2) > 0)
    with pytest.raises(fp.FisherpruneError, match="its layers inside, got a SparseLin"):
        sparse.decompress(layer)


def test_the_dense_checkpoint_of_the_same_masks():
    model, masks, x, _ = case("resnet")
    trained = masked(NETS["resnet"][0](), masks)
    sparse.compress(model, masks, fold=False)
    assert any(isinstance(m, SparseLayer) for m in model.modules())
    model.load_state_dict(trained.state_dict())
    torch.testing.assert_close(model(x), trained(x), rtol=1e-4, atol=1e-5)
    other = NETS["resnet"][0]().state_dict()
    with pytest.raises(RuntimeError, match="'layer1.0.conv1.weight' must be zero wh"):
        model.load_state_dict(other)


def test_own_state_and_copies():
    model, masks, x, _ = case("sequence")
    model.eval()
    sparse.compress(model, masks, fold=False, dense_above=1.0)
    expected, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = sparse.compress(NETS["sequence"][0](), masks, fold=False, dense_above=1.0)
    other.load_state_dict(model.state_dict())
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False), other):
        assert torch.equal(each(x), expected)


def test_a_layer_of_two_names_stays_one():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    masks = {"0.weight": torch.rand(6, 6) < 0.2}
    true, x = masked(model, fp.Masks(masks)), torch.randn(3, 6)
    sparse.compress(model, masks, dense_above=1.0)
    assert model[0] is model[2] and type(model[0]) is sparse.SparseLinear
    torch.testing.assert_close(model(x), true(x))


def test_gradients_flags_and_hooks_go_along():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model(torch.randn(2, 6)).sum().backward()
    calls, grad, bias = [], model[1].weight.grad, model[1].bias
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    masks = {f"{i}.weight": torch.rand(6, 6) < 0.2 for i in range(2)}
    sparse.compress(model, masks, dense_above=1.0)
    assert not model[0].values.requires_grad and model[0].training
    assert model[1].values.requires_grad and not model[1].training
    assert torch.equal(model[1].values.grad, grad[masks["1.weight"]])
    assert model[1].bias is bias
    model(torch.randn(2, 6))
    handle.remove()
    model(torch.randn(2, 6))
    assert calls == [1]


def test_names_of_wrapped_models_fit():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    masks = {"0.weight": torch.rand(6, 6) < 0.2}
    wrapped = torch.compile(model, backend="aot_eager")
    assert sparse.compress(wrapped, masks, dense_above=1.0) is wrapped
    assert type(model[0]) is sparse.SparseLinear
    x = torch.randn(2, 6)
    torch.testing.assert_close(wrapped(x), model(x))
    model = nn.Sequential(nn.Linear(6, 6))
    prefixed = {f"module.{name}": mask for name, mask in masks.items()}
    sparse.compress(model, prefixed, dense_above=1.0)
    assert type(model[0]) is sparse.SparseLinear


def test_attention_reads_its_weights():
    """Torch's fast path in evaluation mode takes weights instead of calling layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    masks = random_masks(model, 0.3)
    true, x = masked(model, masks), torch.randn(2, 5, 8)
    small = sparse.compress(model, masks, dense_above=1.0, fold=False)
    assert type(model.layers[0].linear1) is sparse.SparseLinear
    with torch.no_grad():
        torch.testing.assert_close(small(x), true(x), rtol=1e-4, atol=1e-5)


def test_masks_on_other_devices_and_layouts():
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    masks = {"0.weight": torch.rand(8, 8, 3, 3) < 0.2}
    true, x = masked(model, fp.Masks(masks)), torch.randn(2, 8, 5, 5)
    sparse.compress(model, masks)
    torch.testing.assert_close(model(x), true(x), rtol=1e-4, atol=1e-5)


def test_weights_that_are_called_by_function():
    model = Own(lambda m, x: nn.functional.linear(x, m.fc.weight), fc=nn.Linear(4, 4))
    masks = {"fc.weight": torch.eye(4) > 0}
    true, x = masked(model, fp.Masks(masks)), torch.randn(2, 4)
    sparse.compress(model, masks)
    torch.testing.assert_close(model(x), true(x))
