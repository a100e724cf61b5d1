"""What shrinking takes, refuses, leaves as found and hands back."""

import copy
import sys

import pytest
import torch
from channel_masks import channels_mask, masks_keeping, shrunk, size, widths
from nets import Own, randomized
from sparse_nets import masked
from torch import nn

import fisherprune as fp

pytest.importorskip("torch_pruning")


def two_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def test_masks_found_by_a_criterion_and_training_on():
    model, batch = small_net(), (torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))
    (masks,) = fp.find_masks(model, [batch], "fts", [0.5], structure="channels")
    small = fp.sparse.shrink(model, masks, batch[0])
    assert sum(widths(small).values()) < sum(widths(model).values())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    before = nn.functional.cross_entropy(small(batch[0]), batch[1])
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small(batch[0]), batch[1]).backward()
        optimizer.step()
    assert nn.functional.cross_entropy(small(batch[0]), batch[1]) < before


def test_half_of_the_channels_are_a_quarter_of_the_weights():
    """What docs/how_to/sparse.md says of VGG11, and that of its FLOPs."""
    model, x = fp.models.vgg11(num_classes=10), torch.randn(4, 3, 32, 32)
    batch = x, torch.randint(10, (4,))
    (masks,) = fp.find_masks(
        model, [batch], "fts", [0.5], scope="layer", structure="channels"
    )
    with pytest.warns(fp.FisherpruneWarning, match="1 of 32 of 'features.conv1'"):
        small = fp.sparse.shrink(model, masks, x)
    assert [*widths(small).values()] == [33, 65, 129, 129, 257, 257, 257, 256, 10]
    assert 0.24 < size(small) / size(model) < 0.26
    assert 0.24 < fp.flops(small, x).dense / fp.flops(model, x).dense < 0.27


def test_training_is_that_of_the_masked_model_where_constants_are_zero():
    model = small_net().double()
    masks = masks_keeping(model, _0=[0, 3, 4], _3=[1, 2, 3, 5])
    small, held = fp.sparse.shrink(model, masks, torch.randn(2, 1, 8, 8)), model
    masks.apply_(held)
    assert small.training
    x, y = torch.randn(9, 1, 8, 8).double(), torch.randint(3, (9,))
    for _ in range(3):
        losses = [nn.functional.cross_entropy(m(x), y) for m in (small, held)]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
        for m, loss in zip((small, held), losses, strict=True):
            m.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.1 * p.grad
        masks.apply_(held)


def test_the_model_is_left_as_found():
    model = randomized(small_net())
    model[3].requires_grad_(False)
    model[4].eval()
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    model.register_forward_hook(hook := lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    random = torch.get_rng_state()
    masks = masks_keeping(model, _0=[0, 1], _3=[2, 4, 5])
    with pytest.warns(fp.FisherpruneWarning, match="carries the constants"):
        small = fp.sparse.shrink(model, masks, x)
    assert torch.equal(random, torch.get_rng_state())
    assert x.grad is None
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert modes == [m.training for m in small.modules()]
    assert [*model._forward_hooks.values()] == [hook]
    for p, grad in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    assert trained == {n: p.requires_grad for n, p in small.named_parameters()}
    assert all(p.grad is None and p.is_leaf for p in small.parameters())
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    model = two_layers().to(dtype)
    model[0].float()
    model[2].bias = None
    nn.init.uniform_(model[0].bias, 0.5, 1.0)  # constants that are not 0
    small = fp.sparse.shrink(model, masks_keeping(model, _0=[0, 2]), torch.randn(2, 4))
    assert [p.dtype for p in small.parameters()] == [torch.float32] * 2 + [dtype] * 2
    assert torch.equal(small[2].weight, model[2].weight[:, [0, 2]])
    assert small[2].bias.requires_grad


def test_single_pruned_weights_are_held():
    model = two_layers()
    masks = masks_keeping(model, _0=[0, 2, 3, 5])
    weights = torch.rand(3, 6) < 0.5
    weights[:2], weights[2, [0, 5]] = torch.eye(2, 6) < 1, False  # all are read
    masks = fp.Masks({**masks, "2.weight": weights})
    small = shrunk(model, masks, torch.randn(3, 4))
    left = weights[:, [0, 2, 3, 5]]
    assert torch.equal(small[2].weight != 0, left)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.5)
    small(torch.randn(8, 4).double()).square().sum().backward()
    optimizer.step()
    assert torch.equal(small[2].weight != 0, left)


def test_the_mask_of_a_carrier_keeps_all_that_it_carries():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.Sigmoid(), nn.Conv1d(4, 3, 3, padding=1), nn.Flatten()
    )
    reads = torch.zeros(3, 4, 3, dtype=torch.bool)
    reads[0, 0], reads[1, 1], reads[1, 3, 0], reads[2, 2, 1] = True, True, True, True
    masks = {**masks_keeping(model, _0=[0]), "2.weight": reads}
    small = shrunk(model, fp.Masks(masks), torch.randn(2, 2, 5))
    small(torch.randn(3, 2, 5).double()).sum().backward()
    kept = small[2].weight.grad != 0
    assert kept.shape == (3, 2, 3)
    carried = reads[:, 1:].any(1)
    assert torch.equal(kept[:, 1] | carried, carried)
    assert torch.equal(small[2].weight[:, 1] != 0, carried)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dictionary"])
def test_kinds_of_examples(kind):
    class Net(Own):
        def forward(self, x, scale=1.0):
            return {"out": [self.two(torch.relu(self.one(input=x)) * scale)]}

    model = Net(None, one=nn.Linear(4, 6), two=nn.Linear(6, 3))
    x = torch.randn(3, 4)
    example = {"tensor": x, "tuple": (x, 2.0), "dictionary": {"x": x}}[kind]
    masks = masks_keeping(model, one=[0, 3])
    small = fp.sparse.shrink(model, masks, example)
    assert widths(small) == {"one": 2, "two": 3}
    given = example if kind == "tuple" else (x,)
    out, true = (m(*given)["out"][0] for m in (small, masked(model, masks)))
    torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-6)


def test_numbers_of_words():
    model = nn.Sequential(
        nn.Embedding(9, 5), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4)
    )
    words = torch.randint(9, (1, 1))  # a single one, which varies with nothing
    masks = masks_keeping(model, _1=[0, 2])
    small = shrunk(model, masks, words, torch.randint(9, (3, 7)))
    assert widths(small) == {"1": 2, "3": 4}
    masks = {"0.weight": torch.ones(9, 5) > 0} | dict(masks)
    shrunk(model, fp.Masks(masks), words, torch.randint(9, (3, 7)))


def test_dead_units_of_the_example_stay():
    """They are 0 on the example alone."""
    model = two_layers()
    nn.init.constant_(model[0].bias, -100.0)
    masks = masks_keeping(model, _0=[0, 2, 3])
    small = shrunk(model, masks, torch.zeros(2, 4), torch.randn(4, 4) * 1e4)
    assert widths(small)["0"] == 3


def test_wrapped_models():
    model = two_layers()
    masks = masks_keeping(model, _0=[0, 2])
    compiled = torch.compile(model, backend="eager")
    small = fp.sparse.shrink(compiled, masks, torch.randn(2, 4))
    assert type(small) is nn.Sequential and widths(small)["0"] == 2
    parallel = nn.DataParallel(model)
    named = {f"module.{n}": mask for n, mask in masks.items()}
    small = fp.sparse.shrink(parallel, named, torch.randn(2, 4))
    assert type(small) is nn.Sequential and widths(small)["0"] == 2


def refused(model, masks, x, match):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.FisherpruneError, match=match):
        fp.sparse.shrink(model, masks, x)
    for name, value in model.state_dict().items():
        if not nn.parameter.is_lazy(value):
            assert torch.equal(value, state[name])


def test_refusals_of_arguments():
    model, x = two_layers(), torch.randn(2, 4)
    masks = masks_keeping(model, _0=[0])
    with pytest.raises(fp.FisherpruneError, match="model must be a torch.nn.Module"):
        fp.sparse.shrink("model", masks, x)
    refused(model, None, x, "shrink: masks must map parameter names to bool tensors")
    refused(model, {}, x, "shrink: masks must hold at least one mask")
    refused(model, {"3.weight": torch.eye(3) > 0}, x, "has no parameter '3.weight'")
    refused(model, {"0.weight": torch.eye(3) > 0}, x, "its mask .3, 3.")
    match = "shrink: example_inputs must be a tensor, or a tuple or dictionary"
    refused(model, masks, None, match)
    refused(model, masks, {"x": 3}, match)
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    refused(lazy, {"1.weight": torch.eye(3) > 0}, x, "model must have run once")
    model.kept = model(x)
    refused(model, masks, x, "shrink: the model must be one that can be copied, but")


def test_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = two_layers()
    match = (
        "fisherprune.sparse.shrink needs torch_pruning, but .*; "
        r"pip install 'fisherprune\[torch-pruning\]'"
    )
    refused(model, masks_keeping(model, _0=[0]), torch.randn(2, 4), match)


def test_models_that_do_not_run():
    model = two_layers()
    masks = masks_keeping(model, _0=[0])
    match = "shrink: the model must run on example_inputs in float64, got RuntimeError"
    refused(model, masks, torch.randn(2, 5), match)
    single = Own(lambda m, x: m.two(m.one(x).float()), one=nn.Linear(4, 4),
                 two=nn.Linear(4, 2))  # fmt: skip
    refused(single, masks_keeping(single, one=[0]), torch.randn(2, 4), match)


def test_models_that_can_not_be_traced():
    model = Own(
        lambda m, x: m.two(m.one(x)).detach(), one=nn.Linear(4, 4), two=nn.Linear(4, 2)
    )
    masks = masks_keeping(model, one=[0])
    with pytest.warns(fp.FisherpruneWarning, match="3 of 3 of 'one' .no layer reads"):
        small = fp.sparse.shrink(model, masks, torch.randn(2, 4))
    assert size(small) == size(model)


def test_numbers_of_channels_in_the_code():
    fixed = Own(
        lambda m, x: m.two(torch.relu(m.one(x)).view(-1, 6)),
        one=nn.Linear(4, 6), two=nn.Linear(6, 2),
    )  # fmt: skip
    masks, x = masks_keeping(fixed, one=[0, 1, 2]), torch.randn(2, 4)
    match = "shrink: the smaller model must run on example_inputs in float64, got Run"
    refused(fixed, masks, torch.randn(3, 4), match)
    counting = Own(
        lambda m, x: m.two((h := torch.relu(m.one(x))) * h.shape[1]),
        one=nn.Linear(4, 6), two=nn.Linear(6, 2),
    )  # fmt: skip
    match = "shrink: the smaller model must have the masked model's outputs, but they"
    refused(counting, masks, x, match)


def test_models_in_shards(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = two_layers()
        masks = masks_keeping(model, _0=[0])
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(fp.FisherpruneError, match="shrink: parameters must be who"):
            fp.sparse.shrink(model, masks, torch.randn(2, 4))
    finally:
        torch.distributed.destroy_process_group()


def random_layers(channels):
    """Draw a chain of layers over images, and how many channels come of it."""
    layers = []
    for _ in range(int(torch.randint(2, 5, ()))):
        options = {
            "padding": int(torch.randint(2, ())),
            "bias": bool(torch.randint(2, ())),
            "padding_mode": ["zeros", "zeros", "reflect"][torch.randint(3, ())],
        }
        out = 2 * int(torch.randint(1, 5, ()))
        groups = [1, 1, 2][torch.randint(3, ())] if channels % 2 == 0 else 1
        layers.append(nn.Conv2d(channels, out, 2, groups=groups, **options))
        if torch.rand(()) < 0.6:
            layers.append(nn.BatchNorm2d(out))
        if torch.rand(()) < 0.4:
            layers.append(nn.Conv2d(out, out, 3, padding=1, groups=out))
        layers.append([nn.ReLU(), nn.SiLU(), nn.PReLU(out)][torch.randint(3, ())])
        channels = out
    return layers, channels


def test_random_networks():
    for _ in range(12):
        layers, channels = random_layers(3)
        model = randomized(
            nn.Sequential(
                *layers,
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(4 * channels, 3),
            )
        )
        masks = {
            f"{n}.weight": channels_mask(m, torch.rand(m.out_channels) < 0.6)
            for n, m in model.named_modules()
            if isinstance(m, nn.Conv2d)
        }
        small = shrunk(model, fp.Masks(masks), torch.randn(2, 3, 9, 9))
        assert size(small) <= size(model) + sum(
            m.out_channels for m in model if isinstance(m, nn.Conv2d)
        )
