"""Gradient moments of whole networks against an ordinary backward pass and the peers.

``python -m benchmarks.end_to_end`` times every way on one batch of CIFAR-sized random
images per network, verified against a float64 loop over the images; then ours and plain
passes over several batches, which is what a scoring pass is, for networks, batch and
image sizes (with BackPACK for VGG19); then the peak memory. Times are milliseconds per
image.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Timing, ceilings, peak_extra_bytes, race, verify
from benchmarks.record import arguments, finish, program
from fisherprune import models

Case = tuple[str, int, int]  # network, batch, image size
Peer = Callable[[nn.Module, Tensor, Tensor], peers.Moments]
Call = Callable[[], peers.Moments]
Check = Callable[[str, peers.Moments], None]

TOLERANCE = 5e-2
PASS = 4  # batches in a pass
PLAIN = "forward + backward"  # the only way without a Fisher diagonal
WITH_BACKPACK = [("vgg19", 16, 32)]
BESIDE = "forward + backward, moments beside"
Classes = type[peers.Backpack] | type[peers.Opacus] | type[peers.InTraining]
PEERS: dict[str, Peer | Classes] = {
    "fisherprune": peers.fisherprune,
    PLAIN: peers.plain,
    BESIDE: peers.InTraining,
    "one-image loop": peers.one_image_loop,
    "vmap(grad)": peers.materialize,
    "BackPACK": peers.Backpack,
    "Opacus": peers.Opacus,
}


def network(name: str, device: str) -> nn.Module:
    """Return a network as it is scored: initialized, in eval mode."""
    return models.MODELS[name](num_classes=10).eval().to(device)


def images(batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, size, size, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    return x.to(device), y.to(device)


def competitors(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Call]:
    """Bind the peers to a batch; those that are not installed are left out, aloud."""
    calls: dict[str, Call] = {}
    for name in PEERS:
        peer = ready(name, model)
        if peer is not None:
            calls[name] = partial(peer, model, x, y)
    return calls


def ready(name: str, model: nn.Module) -> Peer | None:
    """Return a peer that has what it needs of the model; None if not installed."""
    peer = PEERS[name]
    try:
        return peer(model) if isinstance(peer, type) else peer
    except ImportError as error:
        print(f"without {name}: {error}")
        return None


def checker(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    """Compare with a float64 loop over the images."""
    return agreement(peers.one_image_loop(copy.deepcopy(model).double(), x.double(), y))


def agreement(truth: peers.Moments) -> Check:
    """Compare with moments that were found another way.

    A ReLU or max-pool whose input rounds to the other side changes a gradient by far
    more than rounding does, in any float32 autograd (up to 1e-2 of the norm is seen):
    hence the tolerance. ``benchmarks.moments`` holds the kernel alone to 1e-5.
    """

    def check(name: str, result: peers.Moments) -> None:
        for parameter, moments in truth.items():
            known = moments[: 1 if name == PLAIN else 2]
            what = f"{name}, {parameter}"
            verify(what, result[parameter], known, tolerance=TOLERANCE)

    return check


def compare(name: str, batch: int, device: str, rounds: int) -> list[dict]:
    """Race all peers over one batch."""
    model, (x, y) = network(name, device), images(batch, 32, device)
    calls = competitors(model, x, y)
    times = race(calls, checker(model, x, y), device=device, rounds=rounds)
    return rows_of((name, batch, 32), 1, times)


def passes_of(case: Case, device: str) -> tuple[dict[str, Call], Check]:
    """Bind ours, plain and at one place BackPACK to a pass of several batches.

    Returns:
        the calls by name, and the check of their results.
    """
    name, batch, size = case
    model, (x, y) = network(name, device), images(batch * PASS, size, device)
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    check = checker(model, *batches[0])
    check("fisherprune", peers.fisherprune(model, *batches[0]))
    ours = partial(peers.fisherprune_pass, model, batches)
    calls: dict[str, Call] = {
        "fisherprune": ours,
        PLAIN: partial(peers.plain_pass, model, batches),
        BESIDE: partial(peers.InTraining(model).over, batches),
    }
    if case in WITH_BACKPACK:
        backpack = ready("BackPACK", model)
        if isinstance(backpack, peers.Backpack):
            calls["BackPACK"] = partial(backpack.over, batches)
    return calls, agreement(ours())


def compare_passes(cases: Iterable[Case], device: str, rounds: int) -> list[dict]:
    """Race the passes of all cases side by side."""
    calls: dict[tuple[Case, str], Call] = {}
    checks: dict[Case, Check] = {}
    for case in cases:
        ways, checks[case] = passes_of(case, device)
        calls |= {(case, what): call for what, call in ways.items()}

    def check(way: tuple[Case, str], result: peers.Moments) -> None:
        case, what = way
        checks[case](what, result)

    times, rows = race(calls, check, device=device, rounds=rounds), []
    for case in cases:
        of_case = {what: time for (of, what), time in times.items() if of == case}
        rows += rows_of(case, PASS, of_case)
    return rows


def rows_of(case: Case, batches: int, times: Mapping[str, Timing]) -> list[dict]:
    """Return one row per competitor, per image."""
    (name, batch, size), ours = case, times["fisherprune"].median
    rows = []
    for what, time in times.items():
        row = {"network": name, "batch": batch, "batches": batches, "image": size}
        row |= {"what": what}
        row |= Timing(tuple(ms / batch / batches for ms in time.samples)).row()
        row |= {"to ours": time.median / ours, "ours to it": ours / time.median}
        rows.append(row)
    return rows


def scaling(device: str, rounds: int, small: bool) -> list[dict]:
    """Time passes over batch size, image size and model size."""
    races = [[("resnet18", 32, 32)], [("vgg19", 16, 32)]]
    # What is compared with each other meets the same changes of the machine's speed.
    races += [[("resnet18", batch, 32) for batch in (8, 256)]]
    races += [[("resnet18", 16, size)] for size in (16, 64)]
    races += [[(name, 16, 32)] for name in ("resnet20", "resnet50")]
    rows = []
    for cases in races[: 1 if small else None]:
        rows += compare_passes(cases, device, rounds)
    return rows


def memory(name: str, batch: int, device: str) -> list[dict]:
    """Peak memory of one pass, above what was in use before it."""
    model, (x, y) = network(name, device), images(batch, 32, device)
    rows = []
    megabytes = {}
    ways = {PLAIN: peers.plain, "fisherprune": peers.fisherprune}
    for what, peer in ways.items():
        call = partial(peer, model, x, y)
        call()
        model.zero_grad(set_to_none=True)
        megabytes[what] = min(peak_extra_bytes(call, device) for _ in range(2)) / 1e6
        model.zero_grad(set_to_none=True)
        row = {"network": name, "batch": batch, "image": 32, "what": f"{what}, memory"}
        rows.append(row | {"MB": megabytes[what]})
    rows[1]["MB above plain"] = megabytes["fisherprune"] - megabytes[PLAIN]
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Draw milliseconds per image by way and network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = [("resnet18", 32), ("vgg19", 16)]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    for axis, (name, batch) in zip(axes, nets, strict=True):
        place = {"network": name, "batch": batch, "batches": 1}.items()
        chosen = {r["what"]: r["ms"] for r in rows if place <= r.items()}
        bars = axis.barh(list(chosen), list(chosen.values()))
        axis.bar_label(bars, fmt=" %.0f")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=f"{name}, batch {batch}", xlabel="milliseconds per image")
    figure.savefig(path, dpi=150)


@program("benchmarks.end_to_end")
def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts and write the result file."""
    parser = arguments("end_to_end", __doc__)
    parser.add_argument("--small", action="store_true", help="few cases, for a trial")
    options = parser.parse_args(argv)
    device, rounds = options.device, options.rounds
    rows = compare("resnet18", 32 if not options.small else 4, device, rounds)
    rows += compare("vgg19", 16 if not options.small else 4, device, rounds)
    rows += scaling(device, rounds, options.small)
    rows += memory("resnet18", 256 if not options.small else 8, device)
    path = finish("end_to_end", rows, ceilings(device), device, options.output)
    if options.plot:
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
