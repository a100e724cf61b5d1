"""Scoring passes of whole networks on a GPU, in TF32, beside plain PyTorch.

Results are held to a float64 loop over the images without TF32, then those with TF32 to
those without; the rows carry that difference as ``error``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from functools import partial

from torch import Tensor

import fisherprune as fp
from benchmarks import end_to_end, peers
from benchmarks.gpu.measure import (
    TF32_NETWORK,
    Goal,
    Rows,
    paired,
    precision,
    relative_error,
    row,
)
from benchmarks.harness import peak_extra_bytes, race, verify


def scores_of(model, found: peers.Moments) -> dict[str, Tensor]:
    """Return the fts scores of exact single-image moments, written out once more."""
    weights = fp.prunable_parameters(model)
    return {
        name: (w.detach() * m + w.detach().square() * fisher / 2).abs()
        for name, w in weights.items()
        for m, fisher in [found[name]]
    }


def verify_network(model, x: Tensor, y: Tensor) -> None:
    """Hold scores, moments and the peer to a float64 loop, without TF32."""
    double = copy.deepcopy(model).double()
    truth = peers.one_image_loop(double, x.double(), y)
    scores, tolerance = scores_of(double, truth), end_to_end.TOLERANCE
    with precision("ieee"):
        for peer in (peers.fisherprune, peers.one_image_loop):
            verify(peer.__name__, peer(model, x, y), truth, tolerance=tolerance)
        found = fp.score(model, [(x, y)], "fts")
    verify("scores", found, scores, tolerance=tolerance)


def scoring(
    device: str,
    name: str = "resnet18",
    count: int = 40_000,
    batch: int = 512,
    looped: int = 200,
    rounds: int = 5,
) -> Iterator[dict]:
    """Time exact fts scores of the published setting, and the one-image loop."""
    model, (x, y) = (
        end_to_end.network(name, device),
        end_to_end.images(count, 32, device),
    )
    verify_network(model, x[:64], y[:64])
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    score = partial(fp.score, model, batches, "fts")
    with precision("ieee"):
        exact = score()

    def check(what: str, found: dict[str, Tensor]) -> None:
        verify(what, found, exact, tolerance=TF32_NETWORK)

    with precision("tf32"):
        error = relative_error(score(), exact)
        ours = race({"score": score}, check, device=device, rounds=rounds)["score"]
    seconds = [ms / 1e3 for ms in ours.samples]
    what, middle = f"{name}, {count:,} images", statistics.median(seconds)
    scores, goal = f"{what}: exact fts scores, TF32, batch {batch}", Goal(2, aim=0.8)
    yield row(scores, "s", seconds, goal, error=error)
    call = partial(peers.one_image_loop, model, x[:looped], y[:looped])
    with precision("tf32"):
        loop = race({"loop": call}, lambda *_: None, device=device, rounds=3)["loop"]
    model.zero_grad(set_to_none=True)
    scaled = [ms / 1e3 * count / looped for ms in loop.samples]
    yield row(f"{what}: one-image loop, TF32, scaled from {looped}", "s", scaled)
    times, goal = [s / middle for s in scaled], Goal(100, at_most=False)
    yield row(f"{what}: one-image loop over ours", "x", times, goal)


def passes(device: str, name: str, batch: int = 512, rounds: int = 9) -> Rows:
    """Time a pass of several batches over plain forward and backward passes."""
    several = end_to_end.PASS
    model = end_to_end.network(name, device)
    x, y = end_to_end.images(batch * several, 32, device)
    verify_network(model, x[:64], y[:64])
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    calls = {
        "ours": partial(peers.fisherprune_pass, model, batches),
        "plain": partial(peers.plain_pass, model, batches),
    }
    with precision("ieee"):
        exact = fisher_of(calls["ours"]())

    def check(what: str, found: peers.Moments) -> None:
        if what == "ours":
            verify(what, fisher_of(found), exact, tolerance=TF32_NETWORK)

    with precision("tf32"):
        error = relative_error(fisher_of(calls["ours"]()), exact)
        times = race(calls, check, device=device, rounds=rounds, warmup=3)
    images = batch * several
    rates = {k: [images / ms * 1e3 for ms in t.samples] for k, t in times.items()}
    place = f"{name}, batch {batch}, TF32"
    return [
        row(
            f"{place}: gradient_moments over forward + backward",
            "x",
            paired(times["ours"], times["plain"]),
            Goal(1.3, aim=1.05),
            error=error,
        ),
        row(f"{place}: gradient_moments", "images/s", rates["ours"]),
        row(f"{place}: forward + backward", "images/s", rates["plain"]),
    ]


def fisher_of(found: peers.Moments) -> dict[str, Tensor]:
    """Return the Fisher diagonals of a peer's result."""
    return {name: fisher for name, (_, fisher) in found.items()}


def memory(
    device: str, name: str = "resnet18", batch: int = 512, rounds: int = 3
) -> Rows:
    """Measure the peak memory of a pass above that of plain forward and backward."""
    model = end_to_end.network(name, device)
    x, y = end_to_end.images(batch, 32, device)
    calls = {
        "plain": partial(peers.plain, model, x, y),
        "ours": partial(peers.fisherprune, model, x, y),
    }
    peaks: dict[str, list[float]] = {what: [] for what in calls}
    with precision("tf32"):
        for i in range(rounds + 1):  # the first chooses algorithms and workspaces
            for what, call in calls.items():
                model.zero_grad(set_to_none=True)
                peak = peak_extra_bytes(call, device) / 1e6
                if i:
                    peaks[what].append(peak)
    above = [o - p for o, p in zip(peaks["ours"], peaks["plain"], strict=True)]
    place = f"{name}, batch {batch}"
    return [
        row(f"{place}: peak memory above forward + backward", "MB", above, Goal(300)),
        row(f"{place}: peak memory of gradient_moments", "MB", peaks["ours"]),
    ]
