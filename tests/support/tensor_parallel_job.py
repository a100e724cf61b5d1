"""What four ranks do with models that tensor parallelism has split.

The ranks are two rows of two: those of a row hold a model together, on the same
batches; the rows have batches of their own. Or all four hold one.
"""

from __future__ import annotations

import warnings
from datetime import timedelta

import tensor_parallel_nets as nets
import torch
from ranks_job import SECONDS
from shard_calls import Failing, whole
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

import fisherprune as fp

RANKS = 4
COUNTS = (8, 5)
"""Samples of each row."""
CODES = "random magnitude snip grasp fts fbss obd hutchinson_diag".split()
FEW = fp.Settings(probes=2)
SCOPES = {
    "global": {},
    "layer": {"scope": "layer"},
    "erk": {"scope": "erk"},
    "least": {"min_per_layer": 5},
    "rounds": {"rounds": 2},
}


class Scaled(nn.Linear):
    """A layer whose weight is computed from its parameter."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class PerHead(nets.Attention):
    """Attention with a parameter that meets other features on each rank."""

    def __init__(self, width):
        super().__init__(width)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, nets.HEAD))

    def heads(self, x):
        return super().heads(x) * self.scale


class Heads(nets.Attention):
    """Attention that counts on the number of heads that a rank has."""

    def forward(self, x):
        assert self.q(x).shape[-1] == nets.WIDTH // RANKS
        return super().forward(x)


def batches_of(seed):
    """Return the batches of each row."""
    return [nets.batches_of(seed + i, n) for i, n in enumerate(COUNTS)]


def every(net):
    """Return all parameters by name."""
    return dict(net.named_parameters())


def moments(net, batches, **options):
    """Return both sums, whole, and counts and paths."""
    found = fp.gradient_moments(net, batches, parameters=every(net), **options)
    sums = whole(found.sum), whole(found.sum_sq)
    return *sums, (found.samples, found.groups), found.paths


class Angle(nn.Module):
    """A parameter in calls of which one has a rule, and one has none."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)
        self.side = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return torch.atan2(x * self.scale, self.side)


def uneven(mesh=None):
    """Return layers of sizes that the ranks can't share evenly."""
    net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7), Angle(7), nn.Linear(7, 6))
    net.append(nn.Flatten(1)).append(nn.Linear(24, nets.CLASSES))
    if mesh is None:
        return net
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate()),
        "1": ColwiseParallel(use_local_output=False),
        "3": RowwiseParallel(),
        "5": ColwiseParallel(use_local_output=False),
    }
    distributed_as(net[2], mesh, Shard(0))
    return parallelize_module(net, mesh, plan)


def distributed_as(module, mesh, placement):
    """Make a module's parameters DTensors."""
    for name, p in module.named_parameters():
        module.register_parameter(
            name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement]))
        )


def split_samples(mesh=None):
    """Return layers of which one sees some of the samples on each rank."""
    net = nn.Sequential(nn.Embedding(7, 6), Angle(6), nn.Flatten(1))
    net.append(nn.Linear(24, nets.CLASSES))
    if mesh is None:
        return net
    distributed_as(net[1], mesh, Replicate())
    samples = PrepareModuleInputOutput(
        input_layouts=(Replicate(),),
        desired_input_layouts=(Shard(0),),
        output_layouts=(Shard(0),),
        desired_output_layouts=(Replicate(),),
    )
    return parallelize_module(net, mesh, {"1": samples})


def seeded(seed, make, *options):
    """Return a network of a function that draws its weights."""
    torch.manual_seed(seed)
    return make(*options)


def few_tokens(batches):
    """Return batches of tokens below 7."""
    return [(x % 7, y) for x, y in batches]


def scaled(seed, mesh=None):
    """Return the transformer with a layer for which there is no fast rule."""
    net = nets.transformer(seed)
    up = net.mlp.up
    net.mlp.up = Scaled(up.in_features, up.out_features)
    net.mlp.up.load_state_dict(up.state_dict())
    return net if mesh is None else nets.split(net, mesh, "rows")


def tied(seed, mesh=None):
    """Return the transformer whose head is its embedding."""
    net = nets.transformer(seed, tied=True)
    if mesh is not None:
        nets.split(net, mesh, "rows")
        net.head.weight = net.embed.weight
    return net


def sharded(net, both, plan):
    """Return a network whose parts FSDP2 has split over the rows."""
    net = nets.split(net, both["tp"], plan)
    fully_shard(net.mlp, mesh=both["dp"])
    return fully_shard(net, mesh=both["dp"])


def scores(net, batches, **options):
    """Return scores of all criteria, by one name each."""
    options = {"parameters": every(net), "settings": FEW, **options}
    found = fp.score_all(net, batches, CODES, **options)
    return {f"{c} {n}": t for c, each in found.items() for n, t in each.items()}


def masks(net, batches, **options):
    """Return masks by every scope."""
    found = {}
    for name, scope in SCOPES.items():
        own = {"ties": "position", "parameters": every(net), **scope, **options}
        (some,) = fp.find_masks(net, batches, "fts", [0.6], **own)
        found |= {f"{name} {n}": m for n, m in some.items()}
    return found


def trained(net, batches, **options):
    """Prune a network and train it for two steps; return its weights."""
    kept = fp.prune(net, batches, "snip", 0.5, ties="position", **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with kept.hold(net, optimizer):
        for x, y in batches[:2]:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    named = {n: p.detach() for n, p in net.named_parameters()}
    return named | {f"mask {n}": m for n, m in kept.items()}


def told(call):
    """Return the error of a call that must fail."""
    try:
        call()
    except (fp.FisherpruneError, OSError) as error:
        return f"{error}"
    return None


def mistakes(seed, mesh, both):
    """Return calls that must fail on all ranks."""
    rank = distributed.get_rank()
    new = lambda mesh=mesh: nets.split(nets.transformer(seed), mesh, "rows")  # noqa: E731
    ours = nets.batches_of(seed, 6)
    rows, columns = both["tp"], both["dp"].get_group()
    net = new()
    scaled_heads = nets.transformer(seed)
    scaled_heads.attention = PerHead(nets.WIDTH)
    nets.split(scaled_heads, mesh, "rows")
    of_parts = nets.transformer(seed)
    of_parts.attention.__class__ = Heads
    nets.split(of_parts, mesh, "rows")
    other = new()
    if rank == 1:
        other.first.weight.data[0] += 1
    two = nets.transformer(seed)
    spread = distribute_tensor(two.head.weight, both, [Replicate(), Replicate()])
    two.head.weight = nn.Parameter(spread)
    mixed = sharded(nets.transformer(seed), both, "rows")
    two_meshes = new(rows)
    two_meshes.extra = parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallel())
    parts = nets.split(nets.transformer(seed), rows, "rows")
    parts.head = parallelize_module(
        nn.Linear(nets.WIDTH, nets.CLASSES), rows, ColwiseParallel()
    )
    low = [(x, y % (nets.CLASSES // 2)) for x, y in ours]
    failing = Failing(ours) if rank == 1 else ours
    group = {"process_group": distributed.group.WORLD}
    of_row = {"process_group": columns}
    different = nets.batches_of(seed + rank, 6)
    return {
        "group": lambda: fp.score(net, ours, **group),
        "batches": lambda: fp.score(net, different, "snip"),
        "fewer": lambda: fp.score(net, ours[: 1 + (rank == 2)], "snip"),
        "reading": lambda: fp.score(new(rows), failing, "snip", **of_row),
        "weights": lambda: fp.score(other, ours, "snip"),
        "seed": lambda: fp.score(net, ours, "snip", seed=rank),
        "two dimensions": lambda: fp.score(two, ours, "snip"),
        "two meshes": lambda: fp.score(two_meshes, ours, "snip"),
        "no group": lambda: fp.score(mixed, ours, "snip"),
        "group of all": lambda: fp.score(mixed, ours, "snip", **group),
        "per head": lambda: fp.score(
            scaled_heads, ours, "snip", parameters=every(scaled_heads)
        ),
        "losses": lambda: fp.score(parts, low, "snip", **of_row),
        "sizes": lambda: fp.score(of_parts, ours, "grasp"),
        "structure": lambda: fp.find_masks(net, ours, "snip", structure="channels"),
        "offload": lambda: fp.gradient_moments(net, ours, offload="cpu"),
        "no batches": lambda: fp.score(net, [], "snip"),
    }


def run_rank(rank, seed, folder):
    """Be a rank: what comes of all calls and mistakes is saved."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    four, group = init_device_mesh("cpu", (4,)), both["dp"].get_group()
    rows = batches_of(seed)
    ours, all_rows = rows[group.rank()], [b for row in rows for b in row]
    saved = {}
    for plan in nets.PLANS:
        net = nets.split(nets.transformer(seed), both["tp"], plan)
        saved[plan] = moments(net, ours, process_group=group)
        net = nets.split(nets.transformer(seed), four, plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # none of ranks that score alone
            saved[f"{plan} of four"] = moments(net, all_rows, group_size=3)
    for plan in ("rows", "sequence"):
        net = sharded(nets.transformer(seed), both, plan)
        saved[f"{plan} sharded"] = moments(net, ours, process_group=group)
        sizes = {n: p.to_local().numel() for n, p in net.named_parameters()}
        saved[f"{plan} sharded sizes"] = sizes
    saved["uneven"] = moments(seeded(seed, uneven, four), few_tokens(all_rows))
    net = seeded(seed, split_samples, four)
    saved["split samples"] = moments(net, few_tokens(all_rows))
    saved["tied"] = moments(tied(seed, four), all_rows)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        saved["scaled"] = moments(scaled(seed, four), all_rows)
    saved["warned"] = [f"{w.message}" for w in shown]
    net = nets.split(nets.transformer(seed), four, "rows")
    found = fp.gradient_moments(net, all_rows, labels="sampled", parameters=every(net))
    saved["sampled"] = whole(found.sum_sq)
    saved["sizes"] = {
        n: (tuple(t.to_local().shape), t.placements)
        for n, t in found.sum_sq.items()
        if hasattr(t, "to_local")
    }
    before = [type(p) for p in net.parameters()], len(net.embed._forward_pre_hooks)
    saved["scores"] = whole(scores(net, all_rows))
    after = [type(p) for p in net.parameters()], len(net.embed._forward_pre_hooks)
    saved["as found"] = before == after and not any(p._grad for p in net.parameters())
    net = nets.split(nets.transformer(seed), both["tp"], "sequence")
    saved["scores of rows"] = whole(scores(net, ours, process_group=group))
    saved["masks"] = whole(masks(net, ours, process_group=group))
    net = sharded(nets.transformer(seed), both, "rows")
    saved["scores of shards"] = whole(scores(net, ours, process_group=group))
    saved["masks of shards"] = whole(masks(net, ours, process_group=group))
    net = nets.split(nets.transformer(seed), four, "columns")
    saved["trained"] = whole(trained(net, all_rows))
    calls = mistakes(seed, four, both)
    saved["told"] = {name: told(call) for name, call in calls.items()}
    torch.save(saved, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
