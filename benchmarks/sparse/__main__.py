"""``python -m benchmarks.sparse``: what masks save, in time, memory and on disk.

``layers``: output and both gradients of single convolutions at some densities, against
PyTorch's dense convolutions, the output alone by its CSR tensors, and SparseProp where
it is installed (``pip install --no-build-isolation sparseprop``). ``steps``: forward,
backward and a step of SGD of whole networks, under random, ERK and FTS masks, against
dense networks in the forms that PyTorch has; sparse ones in float32, and in bfloat16
under autocast. Every sparse step is verified against the dense one of the same masked
weights. ``inference``: forward with BatchNorm folded.
``scaling``: steps over the size of images, the batch, and networks. ``over
fastest`` is how many times faster than the fastest dense float32 form.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import fisherprune as fp
from benchmarks.end_to_end import images
from benchmarks.harness import ceilings, peak_extra_bytes, race, verify
from benchmarks.record import arguments, finish, program
from benchmarks.sparse import layers
from benchmarks.sparse.networks import (
    MASKS,
    Network,
    Step,
    dense_network,
    dense_steps,
    masked,
    masks_of,
    sparse_network,
    state_bytes,
    train_step,
)

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
PARTS = ("layers", "steps", "inference", "scaling")
Rows = list[dict[str, Any]]


def over_fastest(rows: Rows) -> Rows:
    """Compare each row with the fastest dense one in float32, and that in bfloat16."""
    dense = [r["ms"] for r in rows if r["what"].startswith("dense")]
    float32 = [
        r["ms"]
        for r in rows
        if r["what"].startswith("dense") and "bfloat16" not in r["what"]
    ]
    for row in rows:
        row["over fastest"] = min(float32) / row["ms"]
        if len(dense) > len(float32):
            row["over bfloat16"] = dense[-1] / row["ms"]
    return rows


def steps(
    network: str,
    batch: int,
    size: int,
    rounds: int,
    kinds: Sequence[str],
    sparsities: Sequence[float],
    forms: Sequence[str] | None = None,
) -> Rows:
    """Race the steps of a network, dense and sparse; then weigh them."""
    data = images(batch, size, "cpu")
    model = dense_network(network, "cpu").train()
    calls: dict[Any, Step] = dict(dense_steps(model, data))
    if forms is not None:
        calls = {name: calls[name] for name in forms}
    truths: dict[Any, Tensor] = {}
    sparse: dict[Any, nn.Module] = {}
    with torch.no_grad():
        truths |= dict.fromkeys(calls, _loss(model, data))
    for kind in kinds:
        found = masks_of(model, kind, sparsities, size)
        for sparsity, masks in zip(sparsities, found, strict=True):
            truth = _loss(masked(model, masks), data)
            for amp in (False, True):
                key = kind, sparsity, *["bfloat16"] * amp
                truths[key] = truth
                sparse[key] = sparse_network(model, masks, amp)
                calls[key] = train_step(sparse[key], data, amp)

    def check(key: Any, loss: Tensor) -> None:
        limit = 2e-2 if "bfloat16" in key else 1e-3 if "dense" in key else 1e-4
        verify(f"{key}", loss.double(), truths[key].double(), tolerance=limit)

    times = race(calls, check, rounds=rounds)
    place = {"case": "step", "network": network, "batch": batch, "image": size}
    rows = []
    for key, time in times.items():
        row: dict[str, Any] = dict(place)
        own = sparse.get(key, model)
        row["what"] = key if isinstance(key, str) else _words(*key)
        row["sparsity"] = None if isinstance(key, str) else key[1]
        row |= time.row() | {"state MB": state_bytes(own) / 1e6}
        row["step MB"] = peak_extra_bytes(calls[key]) / 1e6
        rows.append(row)
    return over_fastest(rows)


def _words(kind: str, sparsity: float, *dtype: str) -> str:
    return ", ".join(["sparse", kind, *dtype])


def _loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of the dense network in training mode, in float64.

    In float32 PyTorch's BatchNorm makes rounding errors large in channels that hardly
    vary, as those of few weights.
    """
    with torch.no_grad():
        logits = copy.deepcopy(model).double().train()(data[0].double())
    return torch.nn.functional.cross_entropy(logits, data[1])


def inference(network: str, sparsity: float, rounds: int) -> Rows:
    """Race forward passes of one and of 128 images; weigh the files."""
    rows: Rows = []
    model = dense_network(network, "cpu").eval()
    (masks,) = masks_of(model, "random", [sparsity], 32)
    model = masked(model, masks)
    dense = fuse(model)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    sparse = fp.sparse.compress(copy.deepcopy(model), masks)
    for batch in (1, 128):
        x, _ = images(batch, 32, "cpu")
        xl = x.contiguous(memory_format=torch.channels_last)
        calls = {
            "sparse, folded": partial(_outputs, sparse, x),
            "dense, folded": partial(_outputs, dense, x),
            "dense, folded, channels_last": partial(_outputs, last, xl),
            "dense, folded, channels_last, compiled": partial(
                _outputs, torch.compile(last, dynamic=False), xl
            ),
        }
        truth = _outputs(copy.deepcopy(model).double(), x.double())

        def check(what: str, found: Tensor, truth: Tensor = truth) -> None:
            verify(what, found.double(), truth, tolerance=1e-4)

        times = race(calls, check, rounds=rounds)
        place = {"case": "inference", "network": network, "batch": batch}
        rows += over_fastest(
            [
                place | {"what": what, "sparsity": sparsity} | time.row()
                for what, time in times.items()
            ]
        )
    return rows + [_file(network, model, masks, sparsity)]


def _outputs(model: Network, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def _file(network: str, model: nn.Module, masks: fp.Masks, sparsity: float) -> dict:
    """Return the bytes of a file for each kept weight."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        sparse = fp.sparse.compress(copy.deepcopy(model), masks, fold=False)
        fp.sparse.save(sparse, path)
        size = path.stat().st_size
    others = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    others -= 4 * sum(mask.numel() for mask in masks.values())
    return {
        "case": "file",
        "network": network,
        "what": "sparse",
        "sparsity": sparsity,
        "MB": size / 1e6,
        "bytes a kept weight": (size - others) / masks.kept(),
    }


def scaling(rounds: int) -> Rows:
    """Race steps over images, batches and networks, under random masks at 0.98."""
    cases = [("resnet20", 128, 32), ("resnet18", 128, 16), ("resnet18", 32, 64)]
    cases += [("resnet18", batch, 32) for batch in (1, 16, 32)]
    rows: Rows = []
    for network, batch, size in cases:
        forms = ["dense", "dense, channels_last"]
        found = steps(network, batch, size, rounds, ["random"], [0.98], forms)
        rows += [row | {"case": "scaling"} for row in found]
    return rows


def plot(rows: Rows, path: Path) -> None:
    """Draw how many times faster a step is, over sparsity and over what it trains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 3.6), layout="constrained"
    )
    chosen = [r for r in rows if r["case"] == "step" and r["sparsity"]]
    curves = dict.fromkeys((r["network"], r["what"]) for r in chosen)
    for network, what in curves:
        own = [r for r in chosen if (r["network"], r["what"]) == (network, what)]
        left.plot(
            [1 - r["sparsity"] for r in own],
            [r["over fastest"] for r in own],
            marker="o",
            label=f"{network}, {what.removeprefix('sparse, ')}",
        )
    left.set(xscale="log", xlabel="share of weights kept", ylabel="times faster")
    left.set_title("training step over the fastest dense float32 step")
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend(fontsize=7)
    others = [r for r in rows if r["case"] == "scaling" and r["sparsity"]]
    names = [
        f"{r['network']}, batch {r['batch']}, {r['image']} x {r['image']}"
        for r in others
    ]
    bars = right.barh(names, [r["over fastest"] for r in others])
    right.bar_label(bars, fmt=" %.1f")
    right.invert_yaxis()
    right.set_title("other networks, batches and images at 0.98")
    right.margins(x=0.12)
    figure.savefig(path, dpi=150)


@program("benchmarks.sparse")
def main(argv: Sequence[str] | None = None) -> None:
    """Run all parts and write the result file."""
    parser = arguments("sparse", __doc__)
    parser.add_argument("--what", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="resnet20, for a trial")
    options = parser.parse_args(argv)
    networks = ["resnet20"] if options.small else ["resnet18", "vgg19"]
    batch = 16 if options.small else 128
    parts: dict[str, Callable[[], Rows]] = {
        "layers": lambda: layers.compare(
            batch, [0.1, 0.05, 0.02, 0.01], options.rounds
        ),
        "steps": lambda: [
            row
            for network in networks
            for row in steps(
                network, batch, 32, options.rounds, list(MASKS), SPARSITIES
            )
        ],
        "inference": lambda: [
            row for n in networks for row in inference(n, 0.98, options.rounds)
        ],
        "scaling": lambda: scaling(options.rounds),
    }
    rows: Rows = []
    for what in options.what:
        rows += parts[what]()
    path = finish(
        "sparse", rows, ceilings(options.device), options.device, options.output
    )
    if options.plot:
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
