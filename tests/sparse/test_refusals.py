"""What compress refuses, and that nothing is changed then."""

import copy

import pytest
import torch
from sparse_nets import random_masks
from torch import nn
from torch.nn.utils import parametrizations, prune

import fisherprune as fp
from fisherprune import sparse


def two_layers():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def masks_of(*names, shape=(8, 8)):
    """Draw masks that keep a tenth."""
    total = shape[0] * shape[1]
    return {n: (torch.randperm(total) < total // 10).view(shape) for n in names}


def refused(model, masks, match, **options):
    """Expect an error, after which the model is what it was."""
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(fp.FisherpruneError, match=match):
        sparse.compress(model, masks, **options)
    assert dict(model.named_modules()) == modules
    found = model.state_dict()
    assert [*found] == [*state]
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value):
            assert torch.equal(found[name], value), name


def test_no_model():
    with pytest.raises(fp.FisherpruneError, match="model must be a torch.nn.Module"):
        sparse.compress("model", masks_of("a"))


@pytest.mark.parametrize("masks", [None, {}, [torch.ones(2) > 0]])
def test_no_masks(masks):
    refused(two_layers(), masks, "compress: masks must")


def test_a_mask_that_is_no_bool_tensor():
    masks = {"0.weight": torch.ones(8, 8)}
    refused(two_layers(), masks, "compress: mask of '0.weight' must be a bool tensor")


def test_masks_of_another_model():
    model = two_layers()
    refused(
        model,
        masks_of("0.weight", "3.weight"),
        "masks do not fit: Sequential has no parameter '3.weight'",
    )
    masks = masks_of("0.weight") | masks_of("2.weight", shape=(8, 9))
    refused(model, masks, r"'2.weight' of Sequential has shape \[8, 8\], its mask")


def test_tied_weights():
    model = two_layers()
    model[2].weight = model[0].weight
    message = "'0.weight' must be the parameter of one layer, got one tied between Lin"
    refused(model, masks_of("0.weight"), message)
    sparse.compress(model, masks_of("0.weight"), dense_above=0.0)  # dense, it is held


def test_computed_weights():
    match = "must be a parameter of its layer, got one computed from others"
    for compute in (
        parametrizations.weight_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        nn.utils.spectral_norm,
    ):
        model = two_layers()
        compute(model[0])
        refused(model, masks_of("0.weight"), match)
        own = next(n for n, p in model.named_parameters() if p.shape == (8, 8))
        if own != "2.weight":
            refused(model, masks_of(own), match)
        sparse.compress(model, masks_of("2.weight"))


def test_quantized_layers():
    model = two_layers()
    model[0] = torch.ao.nn.quantized.Linear(8, 8)
    match = "'0.weight' must be of a layer not quantized, got a Linear of torch.ao"
    refused(model, masks_of("0.weight"), match)
    config = torch.ao.quantization.default_qat_qconfig
    model[0] = torch.ao.nn.qat.Linear(8, 8, qconfig=config)
    refused(model, masks_of("0.weight"), match)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floats(dtype):
    model = two_layers()
    weight = torch.ones(8, 8).to(dtype)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    match = "compress: '0.weight' must be of floating-point numbers, got torch."
    refused(model, masks_of("0.weight"), match)


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    refused(model, masks_of("1.weight"), "model must have run once")


def test_weights_without_values():
    model = two_layers().to("meta")
    with pytest.raises(
        fp.FisherpruneError, match="with values, got one on the meta device"
    ):
        sparse.compress(model, masks_of("0.weight"))


def test_compressing_twice():
    model = two_layers()
    sparse.compress(model, masks_of("0.weight"), dense_above=1.0)
    match = "the model must be dense, but '0' is a SparseLinear already"
    refused(model, masks_of("2.weight"), match)


def test_gradient_hooks():
    model = two_layers()
    model[0].weight.register_hook(lambda grad: grad)
    match = "'0.weight' must be without a gradient hook"
    refused(model, masks_of("0.weight"), match, dense_above=1.0)


def test_a_layer_itself():
    match = "compress: model must be a module that has its layers inside, .* a Linear"
    refused(nn.Linear(8, 8), masks_of("weight"), match)


@pytest.mark.parametrize("bound", [-0.1, 1.1, True, "0.5", float("nan")])
def test_thresholds(bound):
    match = "compress: dense_above must be a density from 0 to 1, or None, got"
    refused(two_layers(), masks_of("0.weight"), match, dense_above=bound)


def test_folding():
    model = two_layers()
    match = "compress: fold must be False or None for a model in training mode"
    refused(model, masks_of("0.weight"), match, fold=True)
    match = "compress: fold must be True, False or None, got 1"
    refused(model, masks_of("0.weight"), match, fold=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    match = "compress: fold must be False or None with an optimizer"
    model.eval()
    refused(model, masks_of("0.weight"), match, fold=True, optimizer=optimizer)


def test_wrapped_for_several_processes(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(two_layers())
        match = "compressed before it is wrapped, got DistributedDataParallel"
        refused(model, masks_of("0.weight"), match)
        inner = sparse.compress(two_layers(), masks_of("0.weight"), dense_above=1.0)
        wrapped = nn.parallel.DistributedDataParallel(inner)
        wrapped(torch.randn(2, 8)).sum().backward()
        assert inner[0].values.grad is not None
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = two_layers()
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(fp.FisherpruneError, match="whole, got some in shards"):
            sparse.compress(model, masks_of("0.weight"))
    finally:
        torch.distributed.destroy_process_group()


def with_step(optimizer, model):
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step(lambda: model(torch.ones(1, 8)).sum())
    return optimizer


def test_optimizers():
    model = two_layers()
    masks = random_masks(model, 0.2)
    match = "compress: optimizer must be of torch.optim, got 1"
    refused(model, masks, match, optimizer=1)
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    match = "compress: the optimizer does not train '0.weight'"
    refused(model, masks, match, optimizer=other, dense_above=1.0)
    lbfgs = torch.optim.LBFGS(model.parameters())
    match = "compress: optimizer must be one that remembers each parameter by itself"
    refused(model, masks, match, optimizer=lbfgs, dense_above=1.0)
    factored = torch.optim.Adafactor(model.parameters(), lr=0.1)
    with_step(factored, model)
    match = r"compress: the optimizer's 'row_var' of '0.weight' must be a number or a"
    refused(model, masks, match, optimizer=factored, dense_above=1.0)
    assert all(p in factored.state for p in model.parameters())
    odd = with_step(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    odd.state[model[0].weight]["list"] = [torch.zeros(8, 8)]
    refused(model, masks, "the optimizer's 'list' of", optimizer=odd, dense_above=1.0)


def test_stale_optimizers_are_found():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse.check_optimizer(model, optimizer)
    sparse.compress(model, masks_of("0.weight"), dense_above=1.0)
    match = "check_optimizer: optimizer must train '0.values', but does not"
    with pytest.raises(fp.FisherpruneError, match=match):
        sparse.check_optimizer(model, optimizer)
    sparse.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(fp.FisherpruneError, match="optimizer must be of torch.optim"):
        sparse.check_optimizer(model, None)
    model[0].values.requires_grad_(False)
    sparse.check_optimizer(model, optimizer)
