"""Folding of BatchNorm and ReLU: the same outputs by fewer calls."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import Own, randomized
from sparse_nets import NETS, case, doubled, masked, random_masks
from torch import nn

import fisherprune as fp
from fisherprune import sparse


def calls_of(model):
    """Return what a graph calls, as classes and names."""
    names = dict(model.named_modules())
    return [
        type(names[n.target]).__name__ if n.op == "call_module" else n.op
        for n in model.graph.nodes
        if n.op not in ("placeholder", "output")
    ]


def assert_folded(model, masks, x, **options):
    """Compare what is returned, and the model given, with the masked model."""
    true = doubled(masked(model, masks)).eval()
    folded = sparse.compress(model.eval(), masks, dense_above=1.0, **options)
    for each in (folded, model):
        with torch.no_grad():
            out = each(x).double()
        torch.testing.assert_close(out, true(x.double()), rtol=1e-4, atol=1e-4)
    return folded


@pytest.mark.parametrize("fold", [None, True])
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_the_masked_model(name, fold):
    model, masks, x, _ = case(name, density=0.3)
    randomized(model)
    assert_folded(model, masks, x, fold=fold)


def test_what_a_resnet_calls():
    model = randomized(fp.models.resnet20(num_classes=5))
    masks, x = random_masks(model, 0.3), torch.randn(2, 3, 16, 16)
    folded = assert_folded(model, masks, x)
    calls = calls_of(folded)
    assert isinstance(folded, torch.fx.GraphModule)
    assert "BatchNorm2d" not in calls
    layers = [m for m in folded.modules() if isinstance(m, sparse.SparseConv2d)]
    assert sum(layer.relu for layer in layers) == 10  # 9 are behind additions
    functions = {n.target for n in folded.graph.nodes if n.op == "call_function"}
    assert not {F.relu, torch.relu, operator.add, operator.iadd} & functions
    assert not any(m.training for m in folded.modules())
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == []


def added(m, x):
    y = m.one(x)
    return F.relu(m.two(y) + y)


def added_from_the_right(m, x):
    y = m.one(x)
    return (y + m.two(y)).relu()


def added_in_place(m, x):
    y = m.one(x)
    z = m.two(y)
    z += y
    return z


def the_residual_comes_later(m, x):
    y = m.one(x)
    return torch.add(m.two(y), torch.sin(y))


def two_convolutions(m, x):
    return torch.relu(m.one(x) + m.two(x))


def broadcast(m, x):
    y = m.one(x)
    return F.relu(m.two(y) + y.mean((0, 2, 3), keepdim=True))


def larger_than_the_output(m, x):
    y = m.one(x)
    return F.relu(m.two(y[:1]) + y)


def added_before_a_module(m, x):
    y = m.one(x).sin()
    return m.act(m.two(y) + y)


def one_module_for_all(m, x):
    y = m.act(m.one(x))
    return m.act(m.two(y) + y)


SUMS = [
    *(added_before_a_module, one_module_for_all),
    *(added, added_from_the_right, added_in_place, the_residual_comes_later),
    *(two_convolutions, broadcast, larger_than_the_output),
]


def pair_of_convolutions(run):
    parts = {n: nn.Conv2d(4, 4, 3, padding=1) for n in ("one", "two")}
    return Own(run, act=nn.ReLU(), **parts).eval()


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (20, 4, 3, 3), (4, 5, 5)], ids=str)
@pytest.mark.parametrize("run", SUMS)
def test_sums_become_part_of_a_convolution(run, shape):
    if len(shape) == 3 and run in (broadcast, larger_than_the_output):
        pytest.skip("they index the samples")
    model = pair_of_convolutions(run)
    masks = random_masks(model, 0.4)
    folded = assert_folded(model, masks, torch.randn(shape), fold=True)
    left = {*calls_of(folded)} - {"SparseConv2d", "call_function", "call_method"}
    assert not left
    targets = [node.target for node in folded.graph.nodes]
    known = (operator.add, operator.iadd, torch.add, "add_", F.relu, "relu")
    assert not any(t in known for t in targets)


def doubled_output(m, x):
    y = m.two(m.one(x))
    return y + y


def read_twice(m, x):
    y = m.one(x)
    z = m.two(y)
    return F.relu(z + y) * z


def into_the_residual(m, x):
    y = z = m.one(x).sin()
    y += m.two(x)
    return y * z


def scaled(m, x):
    y = m.one(x)
    return torch.add(m.two(y), y, alpha=2)


def changed_meanwhile(m, x):
    y = m.one(x).sin()
    z = m.two(y)
    y.mul_(2)
    return z + y


@pytest.mark.parametrize(
    "run", [doubled_output, read_twice, into_the_residual, scaled, changed_meanwhile]
)
def test_sums_that_stay(run):
    model = pair_of_convolutions(run)
    masks, x = random_masks(model, 0.4), torch.randn(3, 4, 6, 5)
    assert assert_folded(model, masks, x, fold=True) is model


def test_a_residual_of_another_dtype():
    """The sum has the dtype that PyTorch's rules say."""
    model = pair_of_convolutions(lambda m, x: m.two(m.one(x)) + x.double())
    masks, x = random_masks(model, 0.4), torch.randn(3, 4, 6, 5)
    true = masked(model, masks)(x)
    folded = sparse.compress(model, masks, dense_above=1.0, fold=True)
    assert folded(x).dtype == true.dtype == torch.float64
    torch.testing.assert_close(folded(x), true, rtol=1e-5, atol=1e-5)


def test_sums_are_the_graphs_again_when_layers_are_dense():
    model = randomized(fp.models.resnet20(num_classes=5)).eval()
    masks, x = random_masks(model, 0.3), torch.randn(2, 3, 16, 16)
    true = doubled(masked(model, masks))
    folded = sparse.compress(model, masks, dense_above=1.0)
    dense = sparse.decompress(folded)
    assert not any(isinstance(m, sparse.SparseConv2d) for m in dense.modules())
    out = dense(x).double()
    torch.testing.assert_close(out, true(x.double()), rtol=1e-4, atol=1e-4)


def test_max_pooling_keeps_the_layout():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    masks, x = random_masks(model, 0.4), torch.randn(5, 3, 10, 10)
    folded = assert_folded(model, masks, x)
    assert folded(x).permute(1, 2, 3, 0).is_contiguous()
    assert type(model[2]) is nn.MaxPool2d


def test_dense_layers_have_batch_norm_too():
    model = randomized(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),
        )
    )
    masks = fp.Masks({"3.weight": torch.rand(5, 4, 3, 3) < 0.3})
    before = model[0]
    folded = assert_folded(model, masks, torch.randn(2, 3, 8, 8))
    assert calls_of(folded) == ["Conv2d", "ReLU", "SparseConv2d"]
    assert before.bias is None and model[0] is not before
    assert [type(m).__name__ for m in model] == [
        *("Conv2d", "Identity", "ReLU", "SparseConv2d", "Identity")
    ]


def test_masks_of_what_stays_dense_are_folded():
    """Those of BatchNorm, biases and dense layers hold in what comes of them."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9)))
    for density in (0.2, 0.9):
        masks = fp.Masks(
            {
                "0.weight": torch.randperm(9 * 27).view(9, 3, 3, 3) < density * 9 * 27,
                "0.bias": torch.rand(9) < 0.5,
                "1.weight": torch.rand(9) < 0.5,
            }
        )
        true, x = masked(model, masks).eval(), torch.randn(2, 3, 5, 5)
        given = copy.deepcopy(model).eval()
        folded = sparse.compress(given, masks)
        torch.testing.assert_close(folded(x), true(x), rtol=1e-4, atol=1e-5)


def test_what_is_not_folded():
    """Outputs that others need, calls that come again, hooks, statistics of batches."""

    def run(m, x):
        a = m.one(x)
        b = m.bn_one(a) + a  # of two users
        c = m.bn_two(m.two(m.two(b)))  # a layer called twice
        d = m.three(c)
        e = F.relu(d) * d
        f = m.bn_four(m.four(e))  # has a hook
        return m.bn_five(m.five(f)), m.linear_bn(m.linear(f.mean((2, 3))))

    parts = {n: nn.Conv2d(4, 4, 1) for n in ("one", "two", "three", "four", "five")}
    norms = {f"bn_{n}": nn.BatchNorm2d(4) for n in ("one", "two", "four")}
    norms["bn_five"] = nn.BatchNorm2d(4, track_running_stats=False)
    norms |= {"linear": nn.Linear(4, 4), "linear_bn": nn.BatchNorm1d(4)}
    model = Own(run, **parts, **norms).eval()
    for name in ("bn_one", "bn_two", "bn_four", "linear_bn"):
        nn.init.uniform_(getattr(model, name).running_var, 0.5, 2)
    model.four.register_forward_hook(lambda *_: None)
    masks, x = random_masks(model, 0.4), torch.randn(3, 4, 5, 5)
    true = masked(model, masks)
    small = sparse.compress(model, masks, dense_above=1.0, fold=True)
    assert small is model
    for mine, theirs in zip(small(x), true(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert not any(
        m.relu for m in model.modules() if isinstance(m, sparse.SparseConv2d)
    )


def test_a_normalization_of_two_layers_stays():
    """Folded into one of them, the model given would normalize that one twice."""
    model = Own(
        lambda m, x: (m.bn(m.one(x)), m.bn(m.two(x) + x)),
        one=nn.Conv2d(4, 4, 1),
        two=nn.Conv2d(4, 4, 1),
        bn=nn.BatchNorm2d(4),
    )
    masks, x = random_masks(randomized(model).eval(), 0.4), torch.randn(3, 4, 5, 5)
    true = masked(model, masks)
    small = sparse.compress(model, masks, dense_above=1.0, fold=True)
    for mine, again, theirs in zip(small(x), model(x), true(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again, theirs, rtol=1e-4, atol=1e-5)


def test_every_way_to_write_relu():
    def run(m, x):
        x = F.relu(m.a(x), inplace=True)
        x = torch.relu(m.b(x))
        x = m.c(x).relu()
        x = m.shared(m.d(x))
        return m.shared(m.shared(m.e(x)).neg()) + m.f(x).clamp(min=0)

    layers = {name: nn.Linear(6, 6) for name in "abcdef"}
    model = Own(run, **layers, shared=nn.ReLU(inplace=True))
    folded = assert_folded(model, random_masks(model, 0.5), torch.randn(4, 6))
    found = {n for n in "abcdef" if getattr(folded, n).relu}
    assert found == set("abcde")
    assert type(model.shared) is nn.ReLU  # one call of it is left


def test_not_where_the_model_trains():
    model, masks, x, _ = case("conv")
    assert sparse.compress(model, masks) is model
    assert any("BatchNorm" in type(m).__name__ for m in model.modules())
    model, masks, x, _ = case("conv")
    assert sparse.compress(model.eval(), masks, fold=False) is model
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    model, masks, x, _ = case("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sparse.compress(model.eval(), masks, optimizer=optimizer) is model


def untraceable(norm):
    def run(m, x):
        m.seen = x
        out = m.norm(m.conv(x))
        return out if out.sum() > 0 else -out

    return Own(run, conv=nn.Conv2d(3, 4, 1), norm=norm).eval()


def test_untraceable_models_stay_unfolded():
    model = untraceable(nn.BatchNorm2d(4))
    masks, x = {"conv.weight": torch.rand(4, 3, 1, 1) < 0.5}, torch.randn(2, 3, 4, 4)
    true = masked(model, fp.Masks(masks))
    with pytest.warns(fp.FisherpruneWarning, match="torch.fx can't trace the model"):
        assert sparse.compress(model, masks, dense_above=1.0) is model
    assert not hasattr(model, "seen")  # which the attempt had set
    torch.testing.assert_close(model(x), true(x))


def test_no_warning_where_nothing_is_to_be_folded(recwarn):
    model = untraceable(nn.Identity())
    masks = {"conv.weight": torch.eye(4, 3)[..., None, None] > 0}
    assert sparse.compress(model, masks, dense_above=1.0) is model
    assert not [w for w in recwarn if issubclass(w.category, fp.FisherpruneWarning)]
    with pytest.warns(fp.FisherpruneWarning, match="can't trace"):
        sparse.compress(untraceable(nn.Identity()), masks, dense_above=1.0, fold=True)


def test_folded_models_are_copied_and_exported():
    model, masks, x, _ = case("resnet", density=0.3)
    folded = sparse.compress(randomized(model).eval(), masks, dense_above=1.0)
    expected = folded(x)
    for each in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(each(x), expected)
    exported = torch.export.export(folded, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


def test_folded_models_are_decompressed():
    model, masks, x, _ = case("conv", density=0.3)
    folded = sparse.compress(randomized(model).eval(), masks, dense_above=1.0)
    expected = folded(x)
    dense = sparse.decompress(folded)
    assert not any(isinstance(m, sparse.SparseConv2d) for m in dense.modules())
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-5)


def test_constants_of_the_model_stay():
    """Parameters and buffers that the forward pass reads itself."""
    model = Own(
        lambda m, x: F.relu(m.norm(m.conv(x * m.scale))) + m.shift,
        conv=nn.Conv2d(3, 4, 1),
        norm=nn.BatchNorm2d(4),
    )
    model.scale = nn.Parameter(torch.randn(3, 1, 1))
    model.register_buffer("shift", torch.randn(4, 1, 1))
    masks = fp.Masks({"conv.weight": torch.rand(4, 3, 1, 1) < 0.5})
    folded = assert_folded(randomized(model), masks, torch.randn(2, 3, 4, 4))
    assert folded.conv.relu
    assert folded.scale is model.scale
    assert "shift" in dict(folded.named_buffers())
