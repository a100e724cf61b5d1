"""Gradient moments of whole networks against an ordinary backward pass and the peers.

``python -m benchmarks.end_to_end`` times one batch of CIFAR-sized random images per
network, verified against a float64 loop over the images, and reports milliseconds per
image; then how time per image depends on batch, image and model size; then the peak
memory above that of a plain forward and backward pass.
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

TOLERANCE = 1e-5
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
        peer = PEERS[name]
        try:
            peer = peer(model) if isinstance(peer, type) else peer
        except ImportError as error:
            print(f"without {name}: {error}")
            continue
        calls[name] = partial(peer, model, x, y)
    return calls


def checker(model, x, y):
    """Compare results with a float64 loop over the images."""
    truth = peers.one_image_loop(copy.deepcopy(model).double(), x.double(), y)

    def check(name: str, result: peers.Moments) -> None:
        for parameter, (mean, fisher) in truth.items():
            found = result[parameter]
            what = f"{name}, {parameter}"
            verify(f"{what}, mean", found[0], mean, tolerance=10 * TOLERANCE)
            if found[1] is not None:
                verify(f"{what}, Fisher", found[1], fisher, tolerance=TOLERANCE)

    return check


def compare(name, batch, chosen, device, rounds, size=32) -> list[dict]:
    """Race the peers over one batch."""
    model, (x, y) = network(name, device), images(batch, size, device)
    calls = competitors(chosen, model, x, y)
    times = race(calls, checker(model, x, y), device=device, rounds=rounds)
    ours = times["fisherprune"].median
    rows = []
    for peer, time in times.items():
        row = {"network": name, "batch": batch, "image": size, "what": peer}
        row |= {k: v / batch for k, v in time.row().items() if k != "rounds"}
        rows.append(row | {"to ours": time.median / ours, "rounds": rounds})
    return rows


def scaling(device: str, rounds: int, small: bool) -> list[dict]:
    """Time per image over batch size, image size and model size, beside plain."""
    both = ["fisherprune", "forward + backward"]
    cases = [("resnet18", batch, 32) for batch in (8, 32, 64, 256)]
    cases += [("resnet18", 16, size) for size in (16, 64)]
    cases += [(name, 16, 32) for name in ("resnet20", "resnet50", "vgg11")]
    rows = []
    for name, batch, size in cases[: 2 if small else None]:
        rows += compare(name, batch, both, device, rounds, size)
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
        chosen = {r["what"]: r for r in chosen if r["image"] == 32 and "ms" in r}
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
    parser.add_argument("--plot", type=Path, help="draw the comparison into this file")
    options = parser.parse_args(argv)
    device, rounds = options.device, options.rounds
    everyone = list(PEERS)
    rows = compare("resnet18", 32 if not options.small else 4, everyone, device, rounds)
    rows += compare("vgg19", 16 if not options.small else 4, everyone, device, rounds)
    rows += scaling(device, rounds, options.small)
    rows += memory("resnet18", 256 if not options.small else 8, device)
    if options.plot:
        plot(rows, options.plot)
    finish("end_to_end", rows, ceilings(device), device, options.output)


if __name__ == "__main__":
    main()
