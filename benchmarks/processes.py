"""Moments over several processes, each with its share of the images, against the peers.

``python -m benchmarks.processes`` starts 1, 2 and 4 processes that share the cores (on
CUDA each has a GPU). Each finds the moments of its images, and all add them up: ours by
``process_group``, a peer by an all-reduce of what it returns. Every way is verified on
every process against a float64 loop over all images. All processes start each call
together; times are milliseconds per image of all, memory is the most that a call takes
in any process above what it had before.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

import fisherprune as fp
from benchmarks import peers
from benchmarks.end_to_end import (
    Call,
    agreement,
    competitors,
    images,
    network,
)
from benchmarks.harness import ceilings, peak_extra_bytes, race
from benchmarks.record import arguments, at_least_one, finish, program
from fisherprune.errors import FieldError
from fisherprune.runs.device import rank_device
from fisherprune.train.launch import launched
from fisherprune.train.ranks import Ranks, job_here, joined

OURS = "fisherprune"


class Case(NamedTuple):
    """What is measured."""

    network: str
    total: int
    """Images of all processes."""
    device: str
    rounds: int


def ours(ranks: Ranks, model: nn.Module, x: Tensor, y: Tensor) -> peers.Moments:
    """Ours: sums are added up over the group inside of the pass."""
    found = fp.gradient_moments(model, [(x, y)], process_group=ranks.group)
    return {name: (found.mean[name], found.fisher[name]) for name in found.mean}


def added_up(ranks: Ranks, share: float, call: Call) -> peers.Moments:
    """Weigh what a peer finds on this process by its share, add up over all."""
    found = call()
    for moments in found.values():
        for each in moments:
            each.mul_(share)
        ranks.add_up(moments)
    return found


def together(ranks: Ranks, call: Call) -> peers.Moments:
    """Begin when all processes do."""
    if ranks.group is not None:
        distributed.barrier()
    return call()


def calls_of(ranks: Ranks, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Call]:
    """Bind all ways to this process's share of the images."""
    share = ranks.share(len(x))
    mine = x[share.rows], y[share.rows]
    ways = competitors(model, *mine)
    calls: dict[str, Call] = {OURS: partial(ours, ranks, model, *mine)}
    for name, call in ways.items():
        if name != OURS:
            calls[name] = partial(added_up, ranks, share.count / share.total, call)
    return {name: partial(together, ranks, call) for name, call in calls.items()}


def measure(case: Case) -> list[dict[str, Any]]:
    """Verify, time and weigh all ways on one of the processes; return their rows."""
    job = job_here()
    device = rank_device(case.device, job.local if job else 0)
    with joined(job, device) as ranks:
        torch.manual_seed(0)  # the same network everywhere
        model = network(case.network, f"{device}")
        x, y = images(case.total, 32, f"{device}")
        truth = copy.deepcopy(model).double()
        check = agreement(peers.one_image_loop(truth, x.double(), y))
        calls = calls_of(ranks, model, x, y)
        times = race(calls, check, device=device, rounds=case.rounds, repeat=False)
        heights = [peak_extra_bytes(call, device) for call in calls.values()]
        peaks = torch.tensor(heights, device=device)
        if ranks.group is not None:
            distributed.all_reduce(peaks, distributed.ReduceOp.MAX)
    place = {"network": case.network, "images": case.total, "processes": ranks.size}
    place["threads"] = torch.get_num_threads()
    return [
        place
        | {"what": what}
        | {q: ms / case.total for q, ms in time.row().items() if q != "rounds"}
        | {"rounds": case.rounds, "to ours": time.median / times[OURS].median}
        | {"MB": peak / 1e6}
        for (what, time), peak in zip(times.items(), peaks.tolist(), strict=True)
    ]


def compare(case: Case, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of all numbers of processes, and how much faster each is."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        rows += launched(partial(measure, case), count)
    alone = {r["what"]: r["ms"] for r in rows if r["processes"] == counts[0]}
    for row in rows:
        row["speedup"] = alone[row["what"]] / row["ms"]
    return rows


@program("benchmarks.processes")
def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and write the result file."""
    parser = arguments("processes", __doc__)
    parser.add_argument("--small", action="store_true", help="few images, for a trial")
    parser.add_argument(
        "--processes",
        type=at_least_one,
        nargs="+",
        metavar="N",
        default=[1, 2, 4],
        help="numbers of processes (default: 1 2 4); speedups are over the first",
    )
    options = parser.parse_args(argv)
    kind = torch.device(options.device).type
    total = 4 if options.small else 32
    if max(options.processes) > total:
        wanted = f"at most {total}, an image for each"
        raise FieldError("processes", wanted, max(options.processes))
    name = "resnet20" if options.small else "resnet18"
    case = Case(name, total, kind, options.rounds)
    rows = compare(case, options.processes)
    finish("processes", rows, ceilings(options.device), options.device, options.output)


if __name__ == "__main__":
    sys.exit(main())
