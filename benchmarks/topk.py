"""Global top-k over ResNet18-like score tensors, from the scores to bool masks.

Peers, each verified against the exact masks before it is timed: concatenate, select by
``torch.topk``, ``torch.kthvalue``, ``torch.sort`` or ``numpy.partition``, build the
masks. The scores have no ties, so that a comparison with the k-th value, which keeps
too many where there are ties, is right here.

On the CPU all are timed in memory that the process already has; what new memory adds is
a row of its own.

    python -m benchmarks.topk [--output PATH] [--rounds N] [--max-scores N] [--plot]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import (
    Timing,
    ceilings,
    give_back_memory,
    keep_freed_memory,
    peak_extra_bytes,
    race,
    ratios,
    verify,
)
from benchmarks.record import arguments, at_least_one, finish, program
from fisherprune import ops, select_masks
from fisherprune.masks.counts import keep_count

Masks = list[list[Tensor]]
Select = Callable[[Sequence[Tensor], int], list[Tensor]]

# Weights of ResNet18: convolutions, shortcuts, BatchNorm scales and shifts, classifier.
_STAGES = [(64, 64), (64, 128), (128, 256), (256, 512)]
SIZES = [1728, 5120]
for _before, _after in _STAGES:
    SIZES += [9 * _before * _after] + [9 * _after * _after] * 3 + [_after] * 10
    SIZES += [_before * _after] if _before != _after else []
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
SCALES = (1_000_000, 50_000_000, 200_000_000)
LEAST_BITS = 1 << 29  # of the smallest score, a positive float
PEERS_MOST = 20_000_000  # the peers take seconds and gigabytes above


def make_scores(total: int | None, device: str) -> list[Tensor]:
    """Return distinct positive scores of very uneven sizes, in random order.

    ResNet18's tensors, or as many of them, scaled, as make up ``total``.
    """
    sizes = SIZES
    if total is not None:
        sizes = [max(1, s * total // sum(SIZES)) for s in SIZES]
        sizes[-1] += total - sum(sizes)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    values = order.int().add_(LEAST_BITS).view(torch.float32)  # one ulp apart
    return [part.to(device) for part in values.split(sizes)]


def split_like(flat: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
    """Cut one mask for all entries into masks of the tensors."""
    parts = flat.split([s.numel() for s in scores])
    return [p.view(s.shape) for p, s in zip(parts, scores, strict=True)]


def flatten(scores: Sequence[Tensor]) -> Tensor:
    """Copy all entries into one tensor."""
    return torch.cat([s.reshape(-1) for s in scores])


def masks_above(scores: Sequence[Tensor], threshold: Any) -> list[Tensor]:
    return [s >= threshold for s in scores]


def by_topk(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    flat = flatten(scores)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[torch.topk(flat, k, sorted=False).indices] = True
    return split_like(mask, scores)


def by_kthvalue(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    flat = flatten(scores)
    return masks_above(scores, torch.kthvalue(flat, flat.numel() - k + 1).values)


def by_sort(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    return masks_above(
        scores, torch.sort(flatten(scores), descending=True).values[k - 1]
    )


def by_partition(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    flat = flatten(scores).numpy()
    return masks_above(scores, float(np.partition(flat, len(flat) - k)[len(flat) - k]))


def peers(device: str) -> dict[str, Select]:
    """Return the other ways to the masks, by name."""
    found: dict[str, Select] = {
        "cat + topk + indices": by_topk,
        "kthvalue": by_kthvalue,
        "sort": by_sort,
    }
    if torch.device(device).type == "cpu":
        found["numpy.partition"] = by_partition
    return found


def exact_masks(scores: Sequence[Tensor], keep: Sequence[int]) -> Masks:
    """Return the truth, which follows from how the scores were made: by their ranks."""
    total = sum(s.numel() for s in scores)
    return [
        [s.view(torch.int32) >= LEAST_BITS + total - k for s in scores] for k in keep
    ]


def checker(
    scores: Sequence[Tensor], keep: Sequence[int]
) -> Callable[[str, Any], None]:
    truth = exact_masks(scores, keep)
    for masks, k in zip(truth, keep, strict=True):
        verify("kept entries", sum(int(m.sum()) for m in masks), k)
    return lambda name, masks: verify(name, masks, truth)


def reads(times: float, scores: Sequence[Tensor], limits: dict[str, float]) -> dict:
    """Return columns: the scores' bytes per second, as share of the measured read."""
    gbs = sum(s.nbytes for s in scores) / times / 1e6
    return {"GB/s": gbs, "of read": gbs / limits["read_gbs"]}


def select(scores: Sequence[Tensor], keep: Sequence[int]) -> Masks:
    """Return the masks of the op."""
    return ops.global_topk(scores, keep)[0]


def selected(scores: Sequence[Tensor], sparsity: float) -> Masks:
    """Return the masks of the public function."""
    masks = select_masks({str(i): s for i, s in enumerate(scores)}, sparsity)
    assert isinstance(masks, Mapping)  # of one sparsity
    return [list(masks.values())]


def alone(peer: Select, scores: Sequence[Tensor], k: int) -> Masks:
    """Return a peer's masks as those of the only k."""
    return [peer(scores, k)]


def against_peers(device: str, rounds: int, limits: dict[str, float]) -> list[dict]:
    """Time one sparsity of ResNet18's size, against the peers."""
    scores = make_scores(None, device)
    k = keep_count(sum(SIZES), 0.9)
    calls: dict[str, Callable[[], Masks]] = {
        "global_topk": partial(select, scores, [k]),
        "select_masks": partial(selected, scores, 0.9),
    }
    for name, peer in peers(device).items():
        calls[name] = partial(alone, peer, scores, k)
    times = race(calls, checker(scores, [k]), device=device, rounds=rounds)
    slower = ratios(times, "global_topk")
    return [
        {"case": "keep 10 %", "scores": sum(SIZES), "what": name}
        | t.row(ratio=slower[name])
        | reads(t.median, scores, limits)
        for name, t in times.items()
    ]


def several_sparsities(
    device: str, rounds: int, limits: dict[str, float]
) -> list[dict]:
    """Time one call for five sparsities beside a call for one of them."""
    scores = make_scores(None, device)
    keep = [keep_count(sum(SIZES), s) for s in SPARSITIES]
    check_all, check_one = checker(scores, keep), checker(scores, keep[1:2])
    times = race(
        {
            "one": partial(select, scores, keep[1:2]),
            "five": partial(select, scores, keep),
        },
        lambda name, masks: (check_all if name == "five" else check_one)(name, masks),
        device=device,
        rounds=rounds,
    )
    slower = ratios(times, "one")
    return [
        {"case": "sparsities", "scores": sum(SIZES), "what": f"global_topk, {name}"}
        | t.row(ratio=slower[name])
        | reads(t.median, scores, limits)
        for name, t in times.items()
    ]


def in_new_memory(device: str, rounds: int, limits: dict[str, float]) -> list[dict]:
    """Time one sparsity where the masks' pages must come from the system."""
    scores = make_scores(None, device)
    k = keep_count(sum(SIZES), 0.9)
    checker(scores, [k])("global_topk", select(scores, [k]))
    samples = []
    for _ in range(rounds):
        give_back_memory()
        start = time.perf_counter()
        ops.global_topk(scores, [k])
        samples.append((time.perf_counter() - start) * 1e3)
    times = Timing(tuple(samples))
    return [
        {"case": "new memory", "scores": sum(SIZES), "what": "global_topk, new memory"}
        | times.row()
        | reads(times.median, scores, limits)
    ]


def scaling(
    device: str, rounds: int, limits: dict[str, float], most: int
) -> list[dict]:
    """Time keep 10 % at growing sizes; the peak memory counts the masks."""
    rows = []
    for total in sorted([*SCALES, sum(SIZES)]):
        if total > most:
            continue
        scores = make_scores(total, device)
        k = keep_count(total, 0.9)
        calls = {"global_topk": partial(select, scores, [k])}
        if total <= PEERS_MOST:
            calls["cat + topk + indices"] = partial(alone, by_topk, scores, k)
        times = race(calls, checker(scores, [k]), device=device, rounds=rounds)
        for name, t in times.items():
            memory = peak_extra_bytes(calls[name], device) / sum(
                s.nbytes for s in scores
            )
            rows.append(
                {"case": "scaling", "scores": total, "what": name}
                | t.row()
                | reads(t.median, scores, limits)
                | {"peak / scores": memory}
            )
    return rows


def plot(rows: Sequence[dict], path: Path) -> None:
    """Draw the peers at one size, and time over the number of scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bars = [r for r in rows if r["case"] == "keep 10 %"]
    drawn = left.barh([r["what"] for r in bars], [r["ms"] for r in bars])
    left.bar_label(drawn, fmt="%.4g", padding=2)
    left.set(xlabel="ms", title=f"{bars[0]['scores']:,} scores, keep 10 %")
    left.margins(x=0.2)
    left.invert_yaxis()
    for what in dict.fromkeys(r["what"] for r in rows if r["case"] == "scaling"):
        line = [r for r in rows if r["case"] == "scaling" and r["what"] == what]
        right.plot(
            [r["scores"] for r in line], [r["ms"] for r in line], "o-", label=what
        )
    right.set(xlabel="scores", ylabel="ms", xscale="log", yscale="log", title="scaling")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@program("benchmarks.topk")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its result file."""
    parser = arguments("topk", (__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--max-scores",
        type=at_least_one,
        default=max(SCALES),
        help="largest size of the scaling",
    )
    args = parser.parse_args(argv)
    on_cpu = torch.device(args.device).type == "cpu"
    if on_cpu:
        keep_freed_memory()
    limits = ceilings(args.device)
    rows = against_peers(args.device, args.rounds, limits)
    rows += several_sparsities(args.device, args.rounds, limits)
    if on_cpu:
        rows += in_new_memory(args.device, args.rounds, limits)
    rows += scaling(args.device, args.rounds, limits, args.max_scores)
    path = finish("topk", rows, limits, args.device, args.output)
    if args.plot:
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
