"""``python -m benchmarks.targets``: what the kernels must reach, and what was measured.

Reads the result files of one device; measures nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.record import RESULTS, program, table
from fisherprune.commandline import Parser

Rows = list[dict]


@dataclass(frozen=True)
class Target:
    """A number from the rows of one benchmark, and the limit it must keep."""

    what: str
    benchmark: str
    value: Callable[[Rows], float]
    limit: float
    unit: str
    at_most: bool = True

    def row(self, rows: Rows) -> dict:
        """Return the line of the table."""
        value = self.value(rows)
        holds = value <= self.limit if self.at_most else value >= self.limit
        sign = "<=" if self.at_most else ">="
        return {
            "what": self.what,
            "value": value,
            "unit": self.unit,
            "target": f"{sign} {self.limit:g}",
            "holds": "yes" if holds else "NO",
        }


def one(rows: Rows, **wanted: object) -> dict:
    """Return the only row with these columns."""
    found = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows have {wanted}")
    return found[0]


def passes(network: str, batch: int) -> dict:
    """Return the columns of plain passes over several batches of CIFAR images."""
    place = {"network": network, "batch": batch, "image": 32, "batches": 4}
    return place | {"what": "forward + backward"}


def single(network: str, batch: int, what: str) -> dict:
    """Return the columns of one way over one batch of CIFAR images."""
    return {"network": network, "batch": batch, "batches": 1, "what": what}


def flatness(rows: Rows) -> float:
    """Return the time per image at batch 8 over that at batch 256."""
    small, large = (
        one(rows, **passes("resnet18", b) | {"what": "fisherprune"})["ms"]
        for b in (8, 256)
    )
    return small / large


def growth(rows: Rows) -> float:
    """Return the time per score at 200 M over that at 11.2 M."""
    scaling = [r for r in rows if r["case"] == "scaling" and r["what"] == "global_topk"]
    per_score = {r["scores"]: r["ms"] / r["scores"] for r in scaling}
    middle = min(per_score, key=lambda n: abs(n - 11_200_000))
    return per_score[max(per_score)] / per_score[middle]


def largest(rows: Rows) -> dict:
    """Return the row of the most scores."""
    ours = [r for r in rows if r["case"] == "scaling" and r["what"] == "global_topk"]
    return max(ours, key=lambda r: r["scores"])


def times(network: str, batch: int, what: str) -> Callable[[Rows], float]:
    """Return how many times longer than ours a way takes over one batch."""
    return lambda rows: one(rows, **single(network, batch, what))["to ours"]


def over_plain(network: str, batch: int) -> Callable[[Rows], float]:
    """Return the time of a pass of ours over that of a plain one."""
    return lambda rows: one(rows, **passes(network, batch))["ours to it"]


def topk_row(what: str, column: str) -> Callable[[Rows], float]:
    """Return a number of the comparison at 11.2 M scores."""
    return lambda rows: one(rows, case="keep 10 %", what=what)[column]


def five_over_one(rows: Rows) -> float:
    """Return the time for five sparsities over that for one."""
    return one(rows, case="sparsities", what="global_topk, five")["ratio"]


def epoch_over_bare(network: str) -> Callable[[Rows], float]:
    """Return the time of an epoch over that of a bare loop, in float32."""
    return lambda rows: one(rows, network=network, what="float32")["CPU over bare"]


def of_zoo(network: str, most: float) -> Target:
    """Return the target of a pass over all parameters of a network, over plain."""
    return Target(
        f"{network}: pass over plain",
        "zoo",
        lambda rows: one(rows, network=network, what="fisherprune")["over plain"],
        most,
        "x",
    )


MAXIMUM = "maximum, 4 layers of 64 x 128"
"""A network all of whose weights are used by a function without a rule."""


def of_rounds(method: str) -> Target:
    """Return the target of a round of pruning, over the scoring pass in it."""
    return Target(
        f"resnet18, {method}: a round over its scoring pass",
        "rounds",
        lambda rows: one(rows, method=method, what="fisherprune")["over scoring"],
        1.05,
        "x",
    )


def sparse_step(network: str, sparsity: float, least: float) -> Target:
    """Return the target of a sparse step over the fastest dense one in float32."""
    what = "sparse, random"
    place = {"case": "step", "network": network, "what": what, "sparsity": sparsity}
    return Target(
        f"{network}: dense step over sparse at {sparsity}",
        "sparse",
        lambda rows: one(rows, **place)["over fastest"],
        least,
        "x",
        False,
    )


def sparse_over_bfloat16(network: str) -> Target:
    """Return the target of the faster sparse step at 0.98 over dense bfloat16."""
    place = {"case": "step", "network": network, "sparsity": 0.98}
    ways = "sparse, random", "sparse, random, bfloat16"

    def faster(rows: Rows) -> float:
        own = [r for r in rows if place.items() <= r.items() and r["what"] in ways]
        return max(r["over bfloat16"] for r in own)

    return Target(
        f"{network}: dense bfloat16 step over sparse at 0.98",
        "sparse",
        faster,
        1.3,
        "x",
        False,
    )


def sparse_inference(network: str, batch: int) -> Target:
    """Return the target of a sparse forward pass over the fastest dense one."""
    place = {"case": "inference", "network": network, "batch": batch}
    return Target(
        f"{network}, batch {batch}: dense inference over sparse at 0.98",
        "sparse_inference",
        lambda rows: one(rows, **place, what="sparse, folded")["over fastest"],
        3,
        "x",
        False,
    )


END, TOPK, TRAINING = "end_to_end", "topk", "training"
TARGETS = [
    Target(
        "resnet18, batch 32: pass over plain",
        END,
        over_plain("resnet18", 32),
        1.15,
        "x",
    ),
    Target("vgg19, batch 16: pass over plain", END, over_plain("vgg19", 16), 1.25, "x"),
    Target(
        "resnet18: one-image loop over ours",
        END,
        times("resnet18", 32, "one-image loop"),
        2.5,
        "x",
        False,
    ),
    Target(
        "vgg19, batch 16: BackPACK's pass over ours",
        END,
        lambda rows: one(rows, **passes("vgg19", 16) | {"what": "BackPACK"})["to ours"],
        12,
        "x",
        False,
    ),
    Target(
        "resnet18, batch 256: memory above plain",
        END,
        lambda rows: one(rows, what="fisherprune, memory")["MB above plain"],
        200,
        "MB",
    ),
    Target("resnet18: time per image, batch 8 over 256", END, flatness, 1.2, "x"),
    Target(
        "select_masks, 11.2 M scores", TOPK, topk_row("select_masks", "ms"), 15, "ms"
    ),
    Target(
        "cat + topk + indices over ours",
        TOPK,
        topk_row("cat + topk + indices", "ratio"),
        10,
        "x",
        False,
    ),
    Target("time per score, 200 M over 11.2 M", TOPK, growth, 1.3, "x"),
    Target(
        "peak memory at 200 M over the scores",
        TOPK,
        lambda rows: largest(rows)["peak / scores"],
        1.3,
        "x",
    ),
    Target("five sparsities over one", TOPK, five_over_one, 2, "x"),
    Target(
        "resnet18: epoch over bare loop",
        TRAINING,
        epoch_over_bare("resnet18"),
        1.05,
        "x",
    ),
    Target(
        "resnet20: epoch over bare loop",
        TRAINING,
        epoch_over_bare("resnet20"),
        1.05,
        "x",
    ),
    *(of_zoo(name, 1.15) for name in ("resnet50", "densenet121", "convnext_tiny")),
    *(of_zoo(name, 1.15) for name in ("vit, 6 blocks of 384", "swin_t")),
    of_zoo("mobilenet_v3_small", 1.2),
    of_zoo("shufflenet_v2_x1_0", 1.2),
    of_zoo("regnet_y_400mf", 1.2),
    of_zoo("squeezenet1_1", 1.2),
    of_zoo("googlenet", 1.2),
    of_zoo("GPT-2-like", 1.2),
    of_zoo("Llama-like", 1.2),
    of_zoo("LSTM, 2 layers of 256", 1.5),
    Target(
        "maximum, by vmap: vmap(grad) over our pass",
        "zoo",
        lambda rows: one(rows, network=MAXIMUM, what="vmap(grad)")["over ours"],
        1,
        "x",
        at_most=False,
    ),
    *(of_rounds(method) for method in ("snip", "force", "synflow")),
    *(
        sparse_step(network, sparsity, least)
        for network in ("resnet18", "vgg19")
        for sparsity, least in ((0.9, 1.3), (0.95, 2), (0.98, 3), (0.99, 4))
    ),
    *(sparse_over_bfloat16(network) for network in ("resnet18", "vgg19")),
    *(sparse_inference(n, b) for n in ("resnet18", "vgg19") for b in (1, 128)),
    Target(
        "resnet18: bytes a kept weight in a file at 0.98",
        "sparse",
        lambda rows: one(rows, case="file", network="resnet18")["bytes a kept weight"],
        6,
        "B",
    ),
]


@program("benchmarks.targets")
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; benchmarks that have no result file yet are named."""
    parser = Parser("python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    device, rows = parser.parse_args(argv).device, []
    for target in TARGETS:
        path = RESULTS / f"{target.benchmark}-{device}.json"
        if path.exists():
            rows.append(target.row(json.loads(path.read_text())["rows"]))
        else:
            print(f"{target.what}: not measured, {path.name} is missing")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
