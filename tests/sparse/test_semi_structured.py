"""2:4 weights: which layers become so, what they are given, and what is refused."""

import copy
import sys

import pytest
import torch
from sparse_nets import masked
from torch import nn

import fisherprune as fp
from fisherprune.sparse import semi_structured
from fisherprune.sparse.semi_structured import is_two_of_four

HOME = is_two_of_four.__module__


def has_sparse_cores():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


needs_gpu = pytest.mark.skipif(
    not has_sparse_cores(), reason="no GPU of compute capability 8.0"
)


def two_of_four(rows, columns):
    """Draw a mask that keeps 2 of each 4, or fewer."""
    places = torch.rand(rows, columns // 4, 4).argsort(2).argsort(2) < 2
    places &= torch.rand(places.shape) < 0.9
    return places.view(rows, columns)


def net(dtype=torch.float16):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    return model.to(dtype).eval()


def masks_of(model):
    return fp.Masks(
        {
            f"{n}.weight": two_of_four(*m.weight.shape)
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear)
        }
    )


@pytest.fixture
def handed_over(monkeypatch):
    """Let the CPU have sparse cores, and torch's function note what comes."""
    found = []

    def convert(weight):
        if weight.shape[0] % 32 or weight.shape[1] % 32:
            raise RuntimeError(f"Error original_tensor.shape {weight.shape}\n no")
        found.append(weight)
        return weight.clone()

    monkeypatch.setattr(sys.modules[HOME], "lacks_sparse_cores", lambda device: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_with_such_masks_are_handed_over(handed_over, dtype, recwarn):
    model = net(dtype)
    masks, x = masks_of(model), torch.randn(5, 64, dtype=dtype)
    true = masked(model, masks)
    assert semi_structured(model, masks) is model
    assert len(handed_over) == 2 and not recwarn.list
    for layer, other, weight in zip(model[::2], true[::2], handed_over, strict=True):
        assert torch.equal(weight, other.weight) and weight.is_contiguous()
        assert not weight.requires_grad and not layer.weight.requires_grad
    assert torch.equal(model(x), true(x))


def test_what_stays_dense_is_named_once(handed_over):
    class Odd(nn.Linear):
        pass

    parts = {
        "fits": nn.Linear(64, 64), "pattern": nn.Linear(64, 64),
        "shape": nn.Linear(60, 64), "ragged": nn.Linear(62, 64),
        "kind": Odd(64, 64), "conv": nn.Conv2d(64, 64, 1), "tied": nn.Linear(64, 64),
        "tied_too": nn.Linear(64, 64), "single": nn.Linear(64, 64),
    }  # fmt: skip
    model = nn.ModuleDict(parts).half().eval()
    model["tied_too"].weight = model["tied"].weight
    model["single"].float()
    masks = {
        f"{n}.weight": two_of_four(64, 64) for n in ("fits", "kind", "tied", "single")
    }
    masks["pattern.weight"] = two_of_four(64, 64)
    masks["pattern.weight"][7, 8:12] = torch.tensor([True, False, True, True])
    masks["shape.weight"] = two_of_four(64, 60)
    masks["ragged.weight"] = torch.zeros(64, 62) > 0
    masks["conv.weight"] = two_of_four(64, 64)[..., None, None]
    masks["fits.bias"] = torch.rand(64) < 0.5
    masks = fp.Masks(masks)
    true = masked(model, masks)
    with pytest.warns(fp.FisherpruneWarning) as caught:
        semi_structured(model, masks)
    (warning,) = [w for w in caught if "semi_structured" in str(w.message)]
    text = str(warning.message)
    assert "semi_structured: 7 masked parameters stay dense: " in text
    for part in (
        "'pattern.weight' (its mask keeps more than 2 of some 4)",
        "'ragged.weight' (its mask keeps more than 2 of some 4)",
        "'shape.weight' (Error original_tensor.shape torch.Size([64, 60]) no)",
        "'kind.weight' (it is the weight of a Odd)",
        "'conv.weight' (it is the weight of a Conv2d)",
        "'tied.weight' (it is tied)",
        "'single.weight' (it is of float32, neither float16 nor bfloat16)",
    ):
        assert part in text
    assert len(handed_over) == 1 and torch.equal(handed_over[0], true["fits"].weight)
    for mine, theirs in zip(model.parameters(), true.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_pattern():
    for _ in range(20):
        mask = two_of_four(3, 12)
        assert is_two_of_four(mask)
        mask[torch.randint(3, ()), 4 * int(torch.randint(3, ())) :][:3] = True
        counts = [sum(row[i : i + 4]) for row in mask.tolist() for i in (0, 4, 8)]
        assert is_two_of_four(mask) == (max(counts) <= 2)
    assert not is_two_of_four(torch.zeros(4, 6) > 0)
    assert not is_two_of_four(torch.zeros(4) > 0)
    scores = {"a": torch.rand(8, 16)}
    assert is_two_of_four(fp.select_masks(scores, 0.5, structure="2:4")["a"])


def refused(model, masks, match):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.FisherpruneError, match=match):
        semi_structured(model, masks)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_a_device_without_sparse_cores():
    model = net()
    match = (
        "semi_structured: '0.weight' must be on a CUDA device of compute capability "
        "8.0 or higher, got cpu: elsewhere run the masked dense model, or on a CPU "
    )
    refused(model, masks_of(model), match)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_old_gpus(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    lacks = sys.modules[HOME].lacks_sparse_cores(torch.device("cuda:0"))
    assert lacks == ("cuda:0 of 7.5" if capability == (7, 5) else "")


def test_refusals_of_arguments(handed_over):
    with pytest.raises(fp.FisherpruneError, match="model must be a torch.nn.Module"):
        semi_structured(1, {"a": torch.eye(2) > 0})
    model = net()
    masks = masks_of(model)
    refused(model, None, "semi_structured: masks must map parameter names to bool")
    refused(model, {"1.weight": torch.eye(2) > 0}, "has no parameter '1.weight'")
    refused(model.train(), masks, "semi_structured: model must be in evaluation mode")
    lazy = nn.Sequential(nn.LazyLinear(3)).eval()
    with pytest.raises(fp.FisherpruneError, match="model must have run once"):
        semi_structured(lazy, masks)
    assert not handed_over


def test_models_in_shards(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = net(torch.float32)
        masks = masks_of(model)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(fp.FisherpruneError, match="parameters must be whole, got"):
            semi_structured(model, masks)
    finally:
        torch.distributed.destroy_process_group()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    model = net(dtype).cuda()
    masks = masks_of(model)
    true = masked(model, masks).double()
    with torch.no_grad():
        small = semi_structured(model, masks)
        for shape in ((5, 64), (2, 3, 64)):  # torch's kernels take no vectors
            x = torch.randn(*shape, dtype=dtype, device="cuda")
            torch.testing.assert_close(
                small(x).double(), true(x.double()), rtol=3e-2, atol=3e-2
            )
    for layer in small[::2]:
        assert isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor)
