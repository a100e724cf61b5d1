"""replaced and restored: modules change places, and all else stays."""

import copy

import pytest
import torch
from torch import nn

from fisherprune.errors import FisherpruneError
from fisherprune.sparse.convolve import Conv2d
from fisherprune.sparse.normalize import BatchNorm
from fisherprune.sparse.pool import MaxPool2d
from fisherprune.sparse.replace import replaced, restored


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 9, 20), nn.BatchNorm1d(20), nn.Linear(20, 4),
    )  # fmt: skip


def test_replacement_keeps_all_that_a_module_holds():
    model = network()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append("hook"))
    model[6].eval()
    assert replaced(model) is model
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(BatchNorm) == 2 and nn.BatchNorm2d not in kinds
    assert type(model[3]) is MaxPool2d
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model[1].training and not model[6].training
    model(torch.randn(4, 3, 8, 8))
    assert seen == ["hook"]
    assert restored(model) is model
    assert [type(model[i]) for i in (1, 6)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert type(model[3]) is nn.MaxPool2d and "kind" not in vars(model[3])
    assert "kind" not in vars(model[1]) and "relu" not in vars(model[1])
    assert model[1].weight is before["1.weight"]


def innermost(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("layout", [lambda x: x, innermost], ids=["nchw", "chwn"])
@pytest.mark.parametrize("shape", [(20, 4, 9, 8), (1, 4, 6, 6), (4, 6, 6)], ids=str)
def test_dense_convolutions_keep_the_layout(shape, layout):
    model = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
    ours = replaced(copy.deepcopy(model), layers=True)
    assert type(ours) is Conv2d
    x = torch.randn(shape)
    leaves = [x.clone().requires_grad_(), layout(x).requires_grad_()]
    want, got = model(leaves[0]), ours(leaves[1])
    torch.testing.assert_close(got, want)
    innermost_now = len(shape) == 4 and layout is innermost and shape[0] > 1
    assert not innermost_now or got.stride() == innermost(got).stride()
    grad = torch.randn(want.shape)
    want.backward(grad)
    got.backward(layout(grad))
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    torch.testing.assert_close(ours.weight.grad, model.weight.grad)
    assert leaves[1].grad.stride() == leaves[1].stride()
    back = restored(ours)
    assert type(back) is nn.Conv2d and "kind" not in vars(back)


def test_convolutions_stay_unless_asked_for():
    assert type(replaced(network())[0]) is nn.Conv2d


def test_a_shared_module_stays_one():
    norm = nn.BatchNorm2d(3)
    model = replaced(nn.ModuleList([norm, nn.Sequential(norm), norm]))
    assert model[0] is model[2] is model[1][0] and type(model[0]) is BatchNorm
    alone = replaced(norm)
    assert type(alone) is BatchNorm and type(restored(alone)) is nn.BatchNorm2d


def test_what_derives_from_them_stays():
    class Own(nn.BatchNorm2d):
        pass

    own = Own(3)
    assert replaced(own) is own and restored(own) is own
    ours = BatchNorm(3)
    assert replaced(ours) is ours and restored(ours) is ours


def test_copies_and_files(tmp_path):
    ours = replaced(nn.BatchNorm2d(3))
    torch.save(ours, tmp_path / "norm.pt")
    loaded = torch.load(tmp_path / "norm.pt", weights_only=False)
    for other in (copy.deepcopy(ours), loaded):
        assert type(other) is BatchNorm and type(restored(other)) is nn.BatchNorm2d


@pytest.mark.parametrize("function", [replaced, restored])
def test_no_module(function):
    message = f"{function.__name__}: model must be a torch.nn.Module, got 3"
    with pytest.raises(FisherpruneError, match=message):
        function(3)


def test_a_relu_can_not_be_restored():
    norm = replaced(nn.BatchNorm2d(3))
    norm.relu = True
    with pytest.raises(FisherpruneError, match="restored: a BatchNorm2d has no ReLU"):
        restored(norm)
