"""What four ranks do with models whose parameters are in shards."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

import fisherprune as fp

COUNTS = (4, 1, 0, 5)
"""Samples of each rank."""
CODES = ["fts", "fbss", "random", "synflow", "grasp", "obd", "hutchinson_diag"]
FEW = fp.Settings(probes=2)
SCOPES = {
    "global": {},
    "layers": {"scope": "layer"},
    "least": {"min_per_layer": 3},
    "several": {"scope": "erk"},
}


def plain(seed, network):
    """Return the network as FSDP2 takes it."""
    return network(seed).to(memory_format=torch.contiguous_format)


def sharded(net, mesh):
    """Return a network in shards: three layers of their own, and the rest together."""
    for i in (0, 3, 9):
        fully_shard(net[i], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(named):
    """Return whole tensors."""
    return {
        n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items()
    }


def estimates(net, batches, **options):
    """Return estimates and errors of two kinds, and the diagonals beside them."""
    first = fp.hutchinson_diagonal(net, batches, probes=2, **options)
    second = fp.gauss_newton_estimate(net, batches, draws=2, **options)
    named = {"mean": first.mean, "mean of draws": second.mean}
    named |= {"error": first.standard_error, "of draws": second.standard_error}
    return {f"{k} {n}": t for k, each in named.items() for n, t in each.items()}


def trained(net, masks, batches):
    """Train a pruned network for two steps; return its weights and momenta."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.eval()
    with masks.hold(net, optimizer) as hold:
        for x, y in batches[:2]:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
        hold.update({n: m if n == "9.weight" else ~m for n, m in masks.items()})
        held = hold.masks
    named = {n: p.detach() for n, p in net.named_parameters()}
    states = {
        n: optimizer.state[p]["momentum_buffer"] for n, p in net.named_parameters()
    }
    return (
        named
        | {f"momentum {n}": s for n, s in states.items()}
        | {f"held {n}": m for n, m in held.items()}
    )


def tensors(seed):
    """Return scores with many equal ones, and a mask of some."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (3,), "c": (2, 9, 3), "d": (11, 6)}
    scores = {
        n: torch.randint(4, shape, generator=generator).float()
        for n, shape in shapes.items()
    }
    among = {
        n: torch.rand(s.shape, generator=generator) < 0.8 for n, s in scores.items()
    }
    among["b"][:2] = True  # some scopes keep as many of it
    return scores, among


PLACES = {"a": [Shard(0)], "b": [Shard(0)], "c": [Shard(1)], "d": [Replicate()]}


def selected(scores, among):
    """Return masks by every way to choose them."""
    found = {}
    for name, options in SCOPES.items():
        for k, sparsity in enumerate((0.5, 0.8)):
            options = {"ties": "position"} | options
            some = fp.select_masks(scores, sparsity, among=among, **options)
            found |= {f"{name} {k} {n}": m for n, m in some.items()}
    return found


def facts(masks, other):
    """Return what masks say of themselves."""
    both, either = masks & other, masks | other
    return (
        [m.kept() for m in (masks, ~masks, both, either)],
        (masks.sparsity(), masks.density(), masks.total()),
        (masks.jaccard(other), masks.jaccard_by_layer(other)),
        (masks == masks, masks == other, masks == fp.Masks(dict(masks))),
    )


def told(call):
    """Return the error of a call that must fail."""
    try:
        call()
    except (fp.FisherpruneError, OSError) as error:
        return f"{error}"
    return None


def parallel(mesh):
    """Return a network in tensor parallelism."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 5))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(net, mesh, plan)


class Failing(list):
    """Batches of which the second can't be read."""

    def __iter__(self):
        yield self[0]
        raise OSError("no such file")


def mistakes(seed, network, shares, group, subset, mesh):
    """Return calls that must fail on all ranks."""
    rank = distributed.get_rank()
    ours, net = shares[rank][:1], sharded(plain(seed, network), mesh)
    masks = fp.find_masks(net, ours, "magnitude", process_group=group)[0]
    failing = Failing(ours) if rank == 1 else ours
    options = {"process_group": group}
    split = parallel(mesh)
    rows = [(x.flatten(1)[:, :4], y) for x, y in ours]
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    two_ways = fully_shard(parallel(both["shards"]), mesh=both["copies"])
    flat = FullyShardedDataParallel(
        nn.Linear(4, 5), group, device_id=torch.device("cpu")
    )
    channels = {"structure": "channels", **options}
    return {
        "no group": lambda: fp.score(net, ours),
        "no group, moments": lambda: fp.gauss_newton_diagonal(net, ours),
        "other group": lambda: fp.score(
            net, ours, process_group=subset if rank in (1, 3) else None
        ),
        "tensor parallel": lambda: fp.score(split, rows, **options),
        "two ways": lambda: fp.score(two_ways, rows, **options),
        "flat": lambda: fp.score(
            flat, rows, parameters=dict(flat.named_parameters()), **options
        ),
        "structure": lambda: fp.find_masks(net, ours, "snip", **channels),
        "copy": lambda: fp.score(net, ours, "ntk_sap", **options),
        "check": lambda: fp.check(net, shares[0][0]),
        "file": lambda: masks.save("masks.safetensors"),
        "moments file": lambda: fp.gradient_moments(net, ours, **options).save("m"),
        "shuffle": lambda: fp.baselines.shuffle_masks(masks),
        "paths": lambda: fp.effective_masks(net, masks, shares[0][0][0]),
        "batches": lambda: fp.score(net, failing, "snip", **options),
        "forward": lambda: fp.score(net, [(x[:, :2], y) for x, y in ours], **options),
        "no batches": lambda: fp.score(net, [], "snip", **options),
        "infinite": lambda: fp.gradient_moments(
            net, ours, loss_fn=lambda o, y: F.cross_entropy(o, y) * 1e300, **options
        ),
    }


def run(seed, network, batches_of, moments, scores, masks, group, subset):
    """Return what a rank finds, whole, and what its mistakes are answered with."""
    rank, shares = distributed.get_rank(), batches_of(seed, COUNTS)
    ours, mesh = shares[rank], init_device_mesh("cpu", (4,))
    new = lambda mesh=mesh: sharded(plain(seed, network), mesh)  # noqa: E731
    options = {"process_group": group}
    net = new()
    before = [type(p) for p in net.parameters()], len(net._forward_pre_hooks)
    every = {"parameters": dict(net.named_parameters()), "group_size": 3}
    found = fp.gradient_moments(net, ours, **every, **options)
    sizes = {n: tuple(t.to_local().shape) for n, t in found.sum_sq.items()}
    saved = {"sizes": sizes, "paths": found.paths, "counts": found.groups}
    saved["moments"] = found.whole().sum | {
        f"{n} squared": t for n, t in (found + found).whole().sum_sq.items()
    }
    saved["scores"] = whole(scores(CODES, settings=FEW)(net, ours, **options))
    saved["estimates"] = whole(estimates(net, ours, **options))
    saved["masks"] = whole(masks(net, ours, **options))
    after = [type(p) for p in net.parameters()], len(net._forward_pre_hooks)
    saved["as found"] = before == after and not any(p._grad for p in net.parameters())
    mask = fp.prune(net, ours, "fisher_diag", 0.5, ties="position", **options)
    saved["pruned"] = whole({n: p.detach() for n, p in net.named_parameters()})
    other = fp.find_masks(net, ours, "random", [0.3], **options)[0]
    saved["facts"] = facts(mask, other)
    saved["repr"], saved["whole"] = f"{mask}", dict(mask.whole())
    saved["trained"] = whole(trained(new(), mask, batches_of(seed, (6,))[0]))
    other = new()
    mask.whole().apply_(other)
    saved["applied"] = whole({n: p.detach() for n, p in other.named_parameters()})
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    half = {"ties": "position", **options}
    found = fp.find_masks(new(both), ours, "fisher_diag", [0.5], **half)[0]
    saved["two dimensions"] = whole(found)
    scored, among = tensors(seed)
    spread = {n: distribute_tensor(t, mesh, PLACES[n]) for n, t in scored.items()}
    spread["d"] = scored["d"]
    saved["selected"] = whole(selected(spread, among))
    equal = {n: 0 * t for n, t in spread.items()}
    saved["tied"] = told(lambda: fp.select_masks(equal, 0.75))
    split = parallel(mesh)
    half = fp.Masks({"0.weight": torch.eye(8, 4) > 0, "2.weight": torch.eye(5, 8) > 0})
    with half.hold(split):
        saved["split"] = whole({n: p.detach() for n, p in split.named_parameters()})
    if rank in (1, 3):
        few = DeviceMesh.from_group(subset, "cpu", mesh=[1, 3])
        net = sharded(plain(seed, network), few)
        saved["subset"] = whole(moments(net, ours, process_group=subset))
    calls = mistakes(seed, network, shares, group, subset, mesh)
    saved["told"] = {name: told(call) for name, call in calls.items()}
    return saved
