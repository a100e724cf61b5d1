"""Gradient moments of whole networks against an ordinary backward pass and the peers.

``python -m benchmarks.end_to_end`` times every way on one batch of CIFAR-sized random
images per network, verified against a float64 loop over the images; then ours and plain
passes over several batches, which is what a scoring pass is, for networks, batch and
image sizes (with BackPACK for VGG19); then the peak memory. Times are milliseconds per
image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import peers
from benchmarks.harness import ceilings, peak_extra_bytes, race, verify
from benchmarks.record import arguments, finish
from fisherprune import models

TOLERANCE = 5e-2
PASS = 4  # batches in a pass
WITH_BACKPACK = [("vgg19", 16, 32)]  # network, batch, image
PEERS = {
    "fisherprune": peers.fisherprune,
    "forward + backward": peers.plain,
    "one-image loop": peers.one_image_loop,
    "vmap(grad)": peers.materialize,
    "BackPACK": peers.Backpack,
    "Opacus": peers.Opacus,
}


def network(name: str, device: str) -> nn.Module:
    """Return a network as it is scored: initialized, in eval mode."""
    return models.MODELS[name](num_classes=10).eval().to(device)


def images(batch: int, size: int, device: str):
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, size, size, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    return x.to(device), y.to(device)


def competitors(chosen, model, x, y) -> dict[str, Callable[[], peers.Moments]]:
    """Bind the peers to a batch; those that are not installed are left out, aloud."""
    calls = {}
    for name in chosen:
        peer = ready(name, model)
        if peer is not None:
            calls[name] = partial(peer, model, x, y)
    return calls


def ready(name: str, model):
    """Return a peer that has what it needs of the model; None if not installed."""
    peer = PEERS[name]
    try:
        return peer(model) if isinstance(peer, type) else peer
    except ImportError as error:
        print(f"without {name}: {error}")
        return None


def checker(model, x, y):
    """Compare with a float64 loop over the images."""
    return agreement(peers.one_image_loop(copy.deepcopy(model).double(), x.double(), y))


def agreement(truth: peers.Moments):
    """Compare with moments that were found another way.

    A ReLU or max-pool whose input rounds to the other side changes a gradient by far
    more than rounding does, in any float32 autograd (up to 1e-2 of the norm is seen):
    hence the tolerance. ``benchmarks.moments`` holds the kernel alone to 1e-5.
    """

    def check(name: str, result: peers.Moments) -> None:
        for parameter, (mean, fisher) in truth.items():
            found = result[parameter]
            what = f"{name}, {parameter}"
            verify(f"{what}, mean", found[0], mean, tolerance=TOLERANCE)
            if found[1] is not None:
                verify(f"{what}, Fisher", found[1], fisher, tolerance=TOLERANCE)

    return check


def compare(name, batch, device, rounds) -> list[dict]:
    """Race all peers over one batch."""
    model, (x, y) = network(name, device), images(batch, 32, device)
    calls = competitors(PEERS, model, x, y)
    times = race(calls, checker(model, x, y), device=device, rounds=rounds)
    return rows_of(name, batch, 32, 1, times)


def passes_of(name, batch, size, device):
    """Bind ours, plain and at one place BackPACK to a pass of several batches.

    Returns:
        the calls by name, and the check of their results.
    """
    model, data = network(name, device), images(batch * PASS, size, device)
    batches = list(zip(*(part.split(batch) for part in data), strict=True))
    check = checker(model, *batches[0])
    check("fisherprune", peers.fisherprune(model, *batches[0]))
    ours = partial(peers.fisherprune_pass, model, batches)
    calls = {
        "fisherprune": ours,
        "forward + backward": partial(peers.plain_pass, model, batches),
    }
    if (name, batch, size) in WITH_BACKPACK:
        backpack = ready("BackPACK", model)
        calls |= {"BackPACK": partial(backpack.over, batches)} if backpack else {}
    return calls, agreement(ours())


def compare_passes(cases, device, rounds) -> list[dict]:
    """Race the passes of all cases (network, batch, image size) side by side."""
    calls, checks = {}, {}
    for case in cases:
        ways, checks[case] = passes_of(*case, device)
        calls |= {(case, what): call for what, call in ways.items()}

    def check(way, result: peers.Moments) -> None:
        case, what = way
        checks[case](what, result)

    times, rows = race(calls, check, device=device, rounds=rounds), []
    for case in cases:
        of_case = {what: time for (of, what), time in times.items() if of == case}
        rows += rows_of(*case, PASS, of_case)
    return rows


def rows_of(name, batch, size, batches, times) -> list[dict]:
    """Return one row per competitor, per image."""
    ours, rows = times["fisherprune"].median, []
    for what, time in times.items():
        row = {"network": name, "batch": batch, "batches": batches, "image": size}
        row |= {"what": what}
        row |= time.row()
        row |= {q: row[q] / batch / batches for q in ("ms", "q1", "q3")}
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
    for peer in ("forward + backward", "fisherprune"):
        call = partial(PEERS[peer], model, x, y)
        call()
        model.zero_grad(set_to_none=True)
        megabytes = min(peak_extra_bytes(call, device) for _ in range(2)) / 1e6
        model.zero_grad(set_to_none=True)
        row = {"network": name, "batch": batch, "image": 32, "what": f"{peer}, memory"}
        rows.append(row | {"MB": megabytes})
    rows[1]["MB above plain"] = rows[1]["MB"] - rows[0]["MB"]
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Draw milliseconds per image by way and network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = [("resnet18", 32), ("vgg19", 16)]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    for axis, (name, batch) in zip(axes, nets, strict=True):
        chosen = [r for r in rows if (r["network"], r["batch"]) == (name, batch)]
        chosen = {r["what"]: r for r in chosen if r.get("batches") == 1}
        bars = axis.barh(list(chosen), [r["ms"] for r in chosen.values()])
        axis.bar_label(bars, fmt=" %.0f")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=f"{name}, batch {batch}", xlabel="milliseconds per image")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
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
    main()
