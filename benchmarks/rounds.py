"""Pruning in rounds beside the passes that it is made of.

``python -m benchmarks.rounds`` prunes ResNet18 in a few rounds on a batch of 100
images, ten of each class as in the papers, and times the same number of scoring passes
alone, and of plain forward and backward passes: what is above the scoring passes is the
fixed cost of a round, that is to select masks and to set weights to zero. Times are
milliseconds per round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherprune as fp
from benchmarks.end_to_end import images
from benchmarks.harness import ceilings, race, verify
from benchmarks.record import arguments, finish, program
from fisherprune import models

Batch = tuple[Tensor, Tensor]
SPARSITY = 0.98
METHODS = ("snip", "force", "synflow")


def in_rounds(method: str, model: nn.Module, batch: Batch, rounds: int) -> fp.Masks:
    """Prune in rounds."""
    (masks,) = fp.find_masks(
        model, [batch], method, [SPARSITY], rounds=rounds, ties="position"
    )
    return masks


def by_hand(method: str, model: nn.Module, batch: Batch, rounds: int) -> fp.Masks:
    """Do the same with the parts that are public, round by round."""
    named = fp.prunable_parameters(model)
    dense = {name: p.detach().clone() for name, p in named.items()}
    size = sum(p.numel() for p in named.values())
    share, masks = int(size * (1 - SPARSITY) + 1e-6) / size, None
    for t in range(1, rounds + 1):
        sparsity = SPARSITY if t == rounds else 1 - share ** (t / rounds)
        scores = fp.score(model, [batch], method)
        if method == "force":  # of the weights as they were
            moments = fp.gradient_moments(model, [batch])
            scores = {n: (dense[n] * m).abs() for n, m in moments.mean.items()}
        among = None if method == "force" else masks
        masks = fp.select_masks(scores, sparsity, among=among, ties="position")
        for name, p in named.items():
            p.data.copy_(dense[name] * masks[name])
    for name, p in named.items():
        p.data.copy_(dense[name])
    assert masks is not None
    return masks


def passes(method: str, model: nn.Module, batch: Batch, rounds: int) -> None:
    """Score so many times."""
    for _ in range(rounds):
        fp.score(model, [batch], method)


def plain(model: nn.Module, batch: Batch, rounds: int) -> None:
    """Run forward and backward so many times."""
    for _ in range(rounds):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        torch.autograd.grad(loss, list(model.parameters()))


def compare(method: str, samples: int, rounds: int, device: str, times: int) -> list:
    """Race the ways of one method; masks must be those of the parts by hand."""
    model = models.resnet18().eval().to(device)
    batch = images(samples, 32, device)
    wanted = by_hand(method, model, batch, rounds)

    def check(what: str, found: object) -> None:
        if isinstance(found, fp.Masks):
            verify(what, dict(found), dict(wanted))

    calls: dict[str, Callable[[], object]] = {
        "fisherprune": partial(in_rounds, method, model, batch, rounds),
        "scoring passes": partial(passes, method, model, batch, rounds),
        "forward + backward": partial(plain, model, batch, rounds),
    }
    found = race(calls, check, device=device, rounds=times)
    alone = found["scoring passes"].median
    place = {"network": "resnet18", "method": method, "images": samples}
    return [
        {
            **place,
            "pruning rounds": rounds,
            "what": what,
            **{quantile: ms / rounds for quantile, ms in time.row().items()},
            "rounds": times,
            "over scoring": time.median / alone,
        }
        for what, time in found.items()
    ]


@program("benchmarks.rounds")
def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and write the result file."""
    parser = arguments("rounds", __doc__)
    parser.add_argument("--small", action="store_true", help="two rounds, for a trial")
    options = parser.parse_args(argv)
    samples, rounds = (4, 2) if options.small else (100, 3)
    rows = []
    for method in METHODS:
        n = 2 if options.small else 20 if method == "synflow" else rounds
        rows += compare(method, samples, n, options.device, options.rounds)
    finish("rounds", rows, ceilings(options.device), options.device, options.output)


if __name__ == "__main__":
    sys.exit(main())
