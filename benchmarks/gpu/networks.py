"""Scoring and training of whole networks on a GPU, in TF32, beside plain PyTorch.

Results are held to a float64 loop over the images without TF32, then those with TF32 to
those without; the rows carry that difference as ``error``.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fisherprune as fp
from benchmarks import end_to_end, peers, training
from benchmarks.gpu.measure import (
    TF32_NETWORK,
    Goal,
    Row,
    precision,
    ratios,
    relative_error,
    row,
)
from benchmarks.harness import peak_extra_bytes, race, verify
from fisherprune.runs.parts.mask import SCORED_ON_CUDA

PLAIN = end_to_end.PLAIN
OURS = "gradient_moments"
GRAPHED = f"{OURS}, CUDA graph"
"""The batches of a pass as one graph, but for its first ones."""


def scores_of(model: nn.Module, found: peers.Moments) -> dict[str, Tensor]:
    """Return the fts scores of exact single-image moments, written out once more."""
    weights = fp.prunable_parameters(model)
    return {
        name: (w.detach() * m + w.detach().square() * fisher / 2).abs()
        for name, w in weights.items()
        for m, fisher in [found[name]]
    }


def verify_network(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Hold scores, moments and the peer to a float64 loop, without TF32."""
    double = copy.deepcopy(model).double()
    truth = peers.one_image_loop(double, x.double(), y)
    scores, tolerance = scores_of(double, truth), end_to_end.TOLERANCE
    with precision("ieee"):
        for peer in (peers.fisherprune, peers.one_image_loop):
            verify(peer.__name__, peer(model, x, y), truth, tolerance=tolerance)
        found = fp.score(model, [(x, y)], "fts")
    verify("scores", found, scores, tolerance=tolerance)


def part_of(found: peers.Moments, i: int) -> dict[str, Tensor]:
    """Return the mean gradients, 0, or the Fisher diagonals, 1."""
    return {name: moments[i] for name, moments in found.items()}


def scoring(
    device: str,
    name: str = "resnet18",
    count: int = 40_000,
    batch: int = SCORED_ON_CUDA,
    looped: int = 100,
    rounds: int = 5,
) -> Iterator[Row]:
    """Time exact fts scores of the published setting, and the one-image loop."""
    model = end_to_end.network(name, device)
    x, y = end_to_end.images(count, 32, device)
    verify_network(model, x[:64], y[:64])
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    loop = partial(peers.one_image_loop, model, x[:looped], y[:looped])
    calls: dict[str, Callable[[], dict[str, Tensor]]] = {
        "scores": partial(fp.score, model, batches, "fts"),
        "graphed": partial(
            fp.score, model, batches, "fts", settings=fp.Settings(cuda_graph=True)
        ),
        "loop": lambda: part_of(loop(), 1),
    }
    with precision("ieee"):
        exact = {what: call() for what, call in calls.items()}

    def check(what: str, found: dict[str, Tensor]) -> None:
        verify(what, found, exact[what], tolerance=TF32_NETWORK)

    with precision("tf32"):
        error = relative_error(calls["scores"](), exact["scores"])
        warned = warnings_of(calls["graphed"])
        times = race(calls, check, device=device, rounds=rounds)
    model.zero_grad(set_to_none=True)
    seconds = {k: [ms / 1e3 for ms in t.samples] for k, t in times.items()}
    scaled = [s * count / looped for s in seconds["loop"]]
    what, goal = f"{name}, {count:,} images", Goal(2, aim=0.8)
    scores = f"{what}: exact fts scores, TF32, batch {batch}"
    yield row(scores, "s", seconds["scores"], goal, error=error)
    yield row(f"{scores}, CUDA graph", "s", seconds["graphed"], **warned)
    yield row(f"{what}: one-image loop, TF32, scaled from {looped}", "s", scaled)
    over = [a / b for a, b in zip(scaled, seconds["scores"], strict=True)]
    goal = Goal(100, at_most=False)
    yield row(f"{what}: one-image loop over ours", "x", over, goal)


def passes(
    device: str,
    name: str,
    batch: int = 512,
    counts: Sequence[int] = (4, 32),
    rounds: int = 9,
    backend: str | None = None,
) -> Iterator[Row]:
    """Time passes of several batches over plain forward and backward passes.

    Args:
        device: where they run.
        name: of the network.
        batch: images of a batch.
        counts: batches of a pass; few do not hide what a pass costs by itself.
        rounds: samples of each.
        backend: of torch.compile for the plain passes; None runs them eagerly.
    """
    model = end_to_end.network(name, device)
    plain, how = model, "eager"
    if backend:
        plain, how = copy.deepcopy(model), "compiled"
        plain.compile(backend=backend, dynamic=False)
    x, y = end_to_end.images(batch * max(counts), 32, device)
    verify_network(model, x[:64], y[:64])
    whole = list(zip(x.split(batch), y.split(batch), strict=True))
    for count in counts:
        place = f"{name}, {count} batches of {batch}, TF32"
        calls = {
            OURS: partial(peers.fisherprune_pass, model, whole[:count]),
            PLAIN: partial(peers.plain_pass, plain, whole[:count]),
        }
        if not backend:
            calls[GRAPHED] = partial(calls[OURS], cuda_graph=True)
        yield from pass_rows(place, how, calls, batch * count, device, rounds)


def pass_rows(
    place: str,
    how: str,
    calls: Mapping[str, Callable[[], peers.Moments]],
    images: int,
    device: str,
    rounds: int,
) -> Iterator[Row]:
    """Race ours and plain; a ratio over eager passes has a goal."""
    with precision("ieee"):
        exact = calls[OURS]()

    def check(what: str, found: peers.Moments) -> None:
        for i in range(1 if what == PLAIN else 2):
            parts = part_of(found, i), part_of(exact, i)
            verify(what, *parts, tolerance=TF32_NETWORK)

    with precision("tf32"):
        error = relative_error(part_of(calls[OURS](), 1), part_of(exact, 1))
        warned = warnings_of(calls[GRAPHED]) if GRAPHED in calls else {}
        times = race(calls, check, device=device, rounds=rounds, warmup=3)
    rates = {k: [images / ms * 1e3 for ms in t.samples] for k, t in times.items()}
    over, goal = ratios(times[OURS], times[PLAIN]), Goal(1.3, aim=1.05)
    name = f"{place}: {OURS} over {how} {PLAIN}"
    yield row(name, "x", over, goal if how == "eager" else None, error=error)
    yield row(f"{place}: {OURS}", "images/s", rates[OURS])
    yield row(f"{place}: {how} {PLAIN}", "images/s", rates[PLAIN])
    if GRAPHED in calls:
        over = ratios(times[GRAPHED], times[OURS])
        yield row(f"{place}: {GRAPHED} over without", "x", over, **warned)


def warnings_of(call: Callable[[], object]) -> dict[str, Any]:
    """Return what a call warns of, where it does: that it ran without a graph, say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return {"warned": [f"{each.message}" for each in caught]} if caught else {}


def memory(
    device: str, name: str = "resnet18", batch: int = 512, rounds: int = 3
) -> Iterator[Row]:
    """Measure the peak memory of a pass above that of plain forward and backward."""
    model = end_to_end.network(name, device)
    x, y = end_to_end.images(batch, 32, device)
    verify_network(model, x[:8], y[:8])
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
    place, goal = f"{name}, batch {batch}", Goal(300)
    yield row(f"{place}: peak memory above forward + backward", "MB", above, goal)
    yield row(f"{place}: peak memory of gradient_moments", "MB", peaks["ours"])


def train(
    device: str,
    name: str = "resnet18",
    batch: int = 512,
    batches: int = 78,
    rounds: int = 3,
    variants: Sequence[str] = ("float32", "channels_last", "amp, channels_last"),
) -> Iterator[Row]:
    """Extrapolate the time of a whole training run from a few epochs."""
    for variant in variants:
        case = training.Case(name, variant, device, batch, batches)
        with precision("tf32"):
            found = training.measure(case, rounds)
        place = f"training of {name}, {variant}, TF32, batch {batch}"
        rate = found.images / statistics.median(found.times["ours"].samples) * 1e3
        seconds = found.run_seconds
        what = f"{place}: {training.EPOCHS} epochs, from {rounds}"
        yield row(what, "s", seconds, images_per_second=rate)
        yield row(f"{place}: epoch over bare loop", "x", found.over_bare, Goal(1.05))
        torch.cuda.empty_cache()
