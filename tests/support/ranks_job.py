"""A job of four ranks on the CPU, and what it scores.

Each call runs on all ranks, each with its share of the samples; tests run the same call
in one process with all samples.
"""

from __future__ import annotations

import multiprocessing
import warnings
from datetime import timedelta
from tempfile import gettempdir

import shard_calls
import torch
import torch._dynamo  # once, before ranks are forked
from nets import RowByRow, conv_net
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fisherprune as fp
from fisherprune.statistics.hessian_gradient import hessian_gradient_product

RANKS = 4
SECONDS = 300
"""After which a job that hangs is ended."""
SUBSET = 1, 3
UNEVEN, THREES, FIRST, TWICE = (10, 1, 0, 13), (9, 3, 0, 12), (7, 0, 0, 0), (6, 6, 0, 0)


def network(seed):
    """Return a network, the same on all ranks."""
    torch.manual_seed(seed)
    return conv_net().to(memory_format=torch.channels_last)


def batches_of(seed, counts, shape=(3, 9, 9), size=4):
    """Return the batches of each share; the samples are the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), *shape, generator=generator)
    y = torch.randint(5, (len(x),), generator=generator)
    return [
        list(zip(a.split(size), b.split(size), strict=True)) if len(a) else []
        for a, b in zip(x.split(counts), y.split(counts), strict=True)
    ]


def flat(named):
    """Return scores of several criteria by one name each."""
    return {f"{c} {n}": t for c, scores in named.items() for n, t in scores.items()}


def moments(net, batches, **options):
    """Return sums as they are."""
    found = fp.gradient_moments(net, batches, **options)
    counts = found.samples, found.groups, found.exponent
    sums = {f"{n} squared": t for n, t in found.sum_sq.items()}
    facts = {"counts": torch.tensor(counts), "paths": found.paths}
    return found.sum | sums | facts


def scores(criteria, **fixed):
    """Return a call that scores by several criteria."""
    return lambda net, batches, **options: flat(
        fp.score_all(net, batches, criteria, **fixed, **options)
    )


def tiny(outputs, labels):
    """Return a loss whose squared gradients float32 can't hold."""
    return 1e-25 * F.cross_entropy(outputs, labels)


def masks(net, batches, **options):
    """Return masks found in rounds, of two sparsities."""
    options |= {"rounds": 3, "ties": "position"}
    found = fp.find_masks(net, batches, "fts", [0.5, 0.9], **options)
    return {f"{i} {n}": m for i, each in enumerate(found) for n, m in each.items()}


def pruned(net, batches, **options):
    """Return the weights that are left."""
    fp.prune(net, batches, "snip", 0.7, ties="position", **options)
    return {n: p.detach() for n, p in net.named_parameters()}


def rows(batches):
    """Return a model that runs once for each sample, its parameters and batches."""
    torch.manual_seed(7)
    net = RowByRow()
    data = [(x.flatten(1)[:, :12].reshape(-1, 3, 4), y) for x, y in batches]
    return net, data, dict(net.named_parameters())


def row_by_row(_, batches, **options):
    """Score a model that runs once for each sample where a rank has samples."""
    net, data, options["parameters"] = rows(batches)
    return flat(fp.score_all(net, iter(data), ["snip", "grad_norm"], **options))


def large(net, batches, **options):
    """Return moments of more weights than are added up at once."""
    torch.manual_seed(7)
    net, data = nn.Linear(243, 9000), [(x.flatten(1), y) for x, y in batches]
    return moments(net, data, parameters=dict(net.named_parameters()), **options)


def estimates(net, batches, **options):
    """Return what passes find that have functions of their own."""
    product = hessian_gradient_product(net, batches, **options)
    found = {f"product {n}": t for n, t in product.items()}
    exact = fp.gauss_newton_diagonal(net, batches, **options)
    found |= {f"exact {n}": t for n, t in exact.items()}
    return found | shard_calls.estimates(net, batches, **options)


def wrapped(net, batches, **options):
    """Score and prune a network that is wrapped, on the ranks of a job."""
    wrap = options and DistributedDataParallel
    found = moments(wrap(net) if wrap else net, batches, **options)
    net = torch.compile(net)
    net = torch.compile(wrap(net)) if wrap else net
    found |= scores(["grasp", "fts"])(net, batches, **options)
    mask = fp.prune(net, batches, "snip", 0.7, ties="position", **options)
    with torch.no_grad():
        net.get_parameter([n for n, _ in net.named_parameters()][0]).fill_(1.0)
    mask.apply_(net)
    left = dict(zip(found["paths"], net.parameters(), strict=False))
    return (
        found
        | {f"mask {n}": m for n, m in mask.items()}
        | {f"left {n}": p.detach() for n, p in left.items()}
    )


SECOND = ["grasp", "obd", "hutchinson_diag"]
PARTS = {"max_accumulator_bytes": 50_000, "offload": gettempdir()}
DRAWN = fp.Settings(labels="sampled", draws=2)
CALLS = {
    "moments": (UNEVEN, moments),
    "groups": (THREES, lambda n, b, **o: moments(n, b, group_size=3, **o)),
    "criteria": (UNEVEN, scores(["fts", "snip", "random", "magnitude", "synflow"])),
    "second order": (UNEVEN, scores(SECOND, settings=fp.Settings(probes=2))),
    "grasp of groups": (THREES, scores(["grasp", "grad_norm"], group_size=3)),
    "read once": (
        UNEVEN,
        lambda n, b, **o: fp.score(n, iter(b), "grasp", **o),
    ),
    "tiny": (UNEVEN, scores(["fts", "grasp", "fisher_diag"], loss_fn=tiny)),
    "tiny moments": (UNEVEN, lambda n, b, **o: moments(n, b, loss_fn=tiny, **o)),
    "masks in rounds": (UNEVEN, masks),
    "pruned": (UNEVEN, pruned),
    "row by row": (UNEVEN, row_by_row),
    "large": ((1, 1, 2, 1), large),
    "estimates": (FIRST, estimates),
    "batches of all": (UNEVEN, scores(["prospr", "ntk_sap"])),
    "wrapped": (UNEVEN, wrapped),
    "in parts": (UNEVEN, lambda n, b, **o: moments(n, b, **PARTS, **o)),
    "sampled, one rank": (FIRST, scores(["fisher_diag"], settings=DRAWN)),
    "drawn signs, one rank": (FIRST, scores(["obd"], settings=fp.Settings(draws=3))),
}


ALONE = {
    "moments": fp.gradient_moments,
    "hutchinson": lambda n, b: fp.hutchinson_diagonal(n, b, probes=2),
    "gauss_newton": fp.gauss_newton_diagonal,
    "estimate": lambda n, b: fp.gauss_newton_estimate(n, b, draws=2),
    "product": hessian_gradient_product,
    "prospr": lambda n, b: fp.score(n, b, "prospr"),
    "ntk_sap": lambda n, b: fp.score(n, b, "ntk_sap"),
    "prune": lambda n, b: fp.prune(n, b, "snip"),
}


def warned(seed):
    """Return the warnings of calls without a group."""
    found, batches = {}, batches_of(seed, (4,))[0]
    for name, call in ALONE.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(network(seed), batches)
        found[name] = "; ".join(f"{each.message}" for each in caught)
    return found


def sampled(seed, group):
    """Return moments of drawn labels where two ranks have the same samples."""
    ours = batches_of(seed, (6,))[0] if distributed.get_rank() < 2 else []
    return moments(network(seed), ours, labels="sampled", process_group=group)


def failing_loss(rank):
    """Return a loss that fails on a rank."""

    def loss(outputs, labels):
        if distributed.get_rank() == rank:
            raise TypeError("no such loss")
        return F.cross_entropy(outputs, labels)

    return loss


def other_weights(seed):
    """Return a network with another weight on rank 3."""
    net = network(seed)
    with torch.no_grad():
        net[9].weight[0, 0] += float(distributed.get_rank() == 3)
    return net


class Fewer(list):
    """Batches that are half as many when they are read again."""

    def __init__(self, batches, fewer):
        super().__init__(batches * 2)
        self.left = [batches * 2, batches if fewer else batches * 2]

    def __iter__(self):
        return iter(self.left.pop(0))


def mistakes(seed, group, alone):
    """Return calls in which one rank, or all, have a mistake."""
    rank, net = distributed.get_rank(), network(seed)
    ours = batches_of(seed, (4, 4, 4, 4))[rank]
    wrong = [(x, y + 9 * (rank == 1)) for x, y in ours]
    width = 3 + (rank == 2)
    wider = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 5))
    code, data = "fts" if rank else "snip", iter(ours) if rank else ours
    options = {"process_group": group}
    loss = {"loss_fn": failing_loss(2), **options}
    return {
        "loss": lambda: fp.score(net, ours, "fts", **loss),
        "loss of moments": lambda: fp.gradient_moments(net, ours, **loss),
        "loss of grasp": lambda: fp.prune(net, ours, "grasp", **loss),
        "labels": lambda: fp.find_masks(net, wrong, **options),
        "argument": lambda: fp.score(net, ours, group_size=int(rank > 0), **options),
        "fewer": lambda: fp.score(net, Fewer(ours, rank == 3), "grasp", **options),
        "weights": lambda: fp.score(other_weights(seed), ours, **options),
        "shapes": lambda: fp.score(wider, ours, **options),
        "criterion": lambda: fp.score(net, ours, code, **options),
        "seed": lambda: fp.score(net, ours, seed=rank // 3, **options),
        "batches": lambda: fp.score(net, data, **options),
        "calls": lambda: (fp.score if rank else fp.gradient_moments)(
            net, ours, **options
        ),
        "empty": lambda: fp.gradient_moments(net, [], **options),
        "empty flow": lambda: fp.score(net, [], "synflow", **options),
        "empty gradient": lambda: fp.score(net, [], "hutchinson_diag", **options),
        "loss of prospr": lambda: fp.score(net, ours, "prospr", **loss),
        "loss of estimates": lambda: fp.gauss_newton_estimate(
            net, ours, failing_loss(2), **options
        ),
        "batches of one": lambda: fp.score(
            net, 3 if rank == 1 else ours, "prospr", **options
        ),
        "group": lambda: fp.score(net, ours, process_group="WORLD"),
        "other group": lambda: fp.score(net, ours, process_group=alone),
    }


def told(call):
    """Return the error of a call that must fail."""
    try:
        call()
    except fp.FisherpruneError as error:
        return f"{error}"
    except TypeError as error:
        return f"TypeError: {error}"
    return None


def run_calls(seed, group):
    """Run the calls with this rank's share; no rank is told that it scores alone."""
    results, rank = {}, distributed.get_rank(group)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*ranks of torch.distributed")
        for name, (counts, call) in CALLS.items():
            ours = batches_of(seed, counts)[rank]
            results[name] = call(network(seed), ours, process_group=group)
    return results


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
    group, subset = distributed.group.WORLD, distributed.new_group(SUBSET)
    saved = {"calls": run_calls(seed, group), "sampled": sampled(seed, group)}
    saved["warned"] = warned(seed)
    ours = batches_of(seed, UNEVEN)[rank]
    partial = {"group_size": 3, "process_group": group}
    saved["partial"] = moments(network(seed), ours, **partial)
    saved["partial gradient"] = row_by_row(None, ours, **partial)
    saved["again"] = moments(network(seed), ours, process_group=group)
    alone = distributed.new_group([0])
    if rank in SUBSET:
        saved["subset"] = moments(network(seed), ours, process_group=subset)
        wrong = {"loss_fn": failing_loss(3), "process_group": subset}
        saved["subset told"] = told(lambda: fp.score(network(seed), ours, **wrong))
    calls = (network, batches_of, moments, scores, masks)
    saved["shards"] = shard_calls.run(seed, *calls, group, subset)
    calls = mistakes(seed, group, alone if rank else subset)
    saved["told"] = {name: told(call) for name, call in calls.items()}
    torch.save(saved, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def run_job(seed, folder, run=run_rank):
    """Return what each rank saved; a hang ends the job."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_job"])
    ranks = [context.Process(target=run, args=(r, seed, folder)) for r in range(4)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(SECONDS)
    hang = [i for i, each in enumerate(ranks) if each.is_alive()]
    for each in ranks:
        each.kill()
        each.join()
    assert not hang, f"ranks {hang} hang"
    assert [each.exitcode for each in ranks] == [0] * RANKS
    return [torch.load(f"{folder}/{r}.pt", weights_only=False) for r in range(RANKS)]
