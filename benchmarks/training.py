"""An epoch of the training script against the barest loop that trains the same.

``python -m benchmarks.training`` races, in one process, the epoch of ``Trainer``
(draws, crops, flips, normalization, masks, metrics) and a loop of forward, backward and
step over normalized batches that lie in memory, with the same network, optimizer and
format. Before anything is timed, both train on the same batches and must have equal
losses. The masks keep all weights, so that they do, which costs what others cost.

Columns: images per second of ours; ``over bare``, the median over the rounds of the
ratio of both times, which the target wants at most 1.05; ``CPU over bare``, the same
of the processor time, which other processes disturb less; ``speedup`` of ours over ours
in float32 with contiguous tensors; ``160 epochs``, hours of ours on the 40,000 training
images of CIFAR-10 with the validations on 10,000 and the checkpoints, extrapolated.
Validation and checkpoint are verified too: against the plain metrics of the images, and
against the state that was saved.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import Timing, ceilings, race, verify
from benchmarks.record import arguments, at_least_one, finish, program
from fisherprune import models
from fisherprune.data.augment import TrainingBatches
from fisherprune.data.dataset import Augmentation, Dataset
from fisherprune.masks.masks import Masks
from fisherprune.parameters import prunable_parameters
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.folder import RunFolder
from fisherprune.train.checkpoint import Checkpoint
from fisherprune.train.images import Images
from fisherprune.train.trainer import Trainer, compiled, evaluate, make_optimizer

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"memory_format": "contiguous"},
    "channels_last": {"memory_format": "channels_last"},
    "amp": {"memory_format": "contiguous", "amp": True},
    "amp, channels_last": {"memory_format": "channels_last", "amp": True},
    "compile": {"memory_format": "contiguous", "compile": True},
    "amp, channels_last, compile": {
        "memory_format": "channels_last",
        "amp": True,
        "compile": True,
    },
}
TRAINED, VALIDATED, EPOCHS = 40_000, 10_000, 160
BATCH = 256  # images at a time of the loss that a validation is held to


@dataclass(frozen=True)
class Case:
    """What is trained, and how much of it is an epoch here."""

    network: str
    variant: str
    device: str
    batch: int
    batches: int

    @property
    def config(self) -> TrainConfig:
        """The run's; its folder is made elsewhere."""
        options = VARIANTS[self.variant]
        return TrainConfig(
            model=self.network, batch_size=self.batch, device=self.device, **options
        )

    def data(self) -> Dataset:
        """Return random images and labels."""
        count, generator = self.batch * self.batches, torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 3, 32, 32), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        data = Dataset(
            images.to(torch.uint8),
            labels,
            tuple("0123456789"),
            (0.5,) * 3,
            (0.25,) * 3,
            Augmentation(4, True),
        )
        return data.to(torch.device(self.device))

    def model(self) -> nn.Module:
        """Return the network, the same every time."""
        return models.create(self.network, seed=0).to(self.device)


def our_trainer(case: Case, data: Dataset, folder: Path) -> Trainer:
    """Return the trainer of the script, under masks that keep all."""
    model, images = case.model(), Images(data, data, data, data)
    trainer = Trainer(case.config, model, images, RunFolder(case.config, folder), True)
    named = prunable_parameters(model).items()
    trainer.prune(Masks({k: torch.ones_like(p, dtype=torch.bool) for k, p in named}))
    return trainer


def bare_loop(case: Case, trainer: Trainer) -> Callable[[], float]:
    """Return a loop over what will be the trainer's first batches, without any more."""
    ours = trainer.batches
    order, chance = ours.order.clone_state(), ours.chance.clone_state()
    form = trainer.memory_format
    batches = list(TrainingBatches(ours.dataset, case.batch, order, chance, form))
    model = case.model().to(memory_format=form).train()
    network = compiled(model) if case.config.compile else model
    optimizer = make_optimizer(case.config, model)
    device, amp = torch.device(case.device).type, case.config.amp

    def loop() -> float:
        losses = []
        for images, labels in batches:
            with torch.autocast(device, torch.bfloat16, amp):
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).double().mean().item()

    return loop


class Counted:
    """A function that keeps the processor time of each call, all threads together."""

    def __init__(self, call: Callable[[], float]) -> None:
        """Wrap ``call``."""
        self.call = call
        self.seconds: list[float] = []

    def __call__(self) -> float:
        """Call it."""
        start = time.process_time()
        result = self.call()
        self.seconds.append(time.process_time() - start)
        return result


@dataclass(frozen=True)
class Measured:
    """Milliseconds of what a run does: epochs, validations, checkpoints."""

    case: Case
    times: dict[str, Timing]
    over_bare_cpu: list[float]

    @property
    def over_bare(self) -> list[float]:
        """Return ours to bare, round by round."""
        return ratios(self.times["ours"].samples, self.times["bare"].samples)

    @property
    def images(self) -> int:
        """Images of an epoch here."""
        return self.case.batch * self.case.batches

    @property
    def run_seconds(self) -> list[float]:
        """Return what a whole run takes by each round; extrapolated."""
        validated = self.times["validation"].median * VALIDATED / self.images
        beside = validated + self.times["checkpoint"].median
        epochs = (ms * TRAINED / self.images for ms in self.times["ours"].samples)
        return [EPOCHS * (epoch + beside) / 1e3 for epoch in epochs]

    def row(self) -> dict[str, Any]:
        """Return the line of the table."""
        return {
            "network": self.case.network,
            "batch": self.case.batch,
            "what": self.case.variant,
            "images/s": self.images / self.times["ours"].median * 1e3,
            "over bare": statistics.median(self.over_bare),
            "least": min(self.over_bare),
            "most": max(self.over_bare),
            "CPU over bare": statistics.median(self.over_bare_cpu),
            "rounds": len(self.over_bare),
            "validation images/s": self.images / self.times["validation"].median * 1e3,
            "checkpoint ms": self.times["checkpoint"].median,
            "160 epochs, h": statistics.median(self.run_seconds) / 3600,
        }


def ratios(ours: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Return ours to bare, round by round."""
    return [a / b for a, b in zip(ours, bare, strict=True)]


def measure(case: Case, rounds: int) -> Measured:
    """Race both loops, then time what a run does beside its steps."""
    data = case.data()
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(case, data, Path(folder))
        bare = bare_loop(case, trainer)
        truth = bare_loop(case, trainer)()
        ours = Counted(lambda: trainer.pass_over(trainer.batches).loss)
        bare = Counted(bare)
        times = race(
            {"ours": ours, "bare": bare},
            lambda name, loss: verify(name, loss, truth, tolerance=1e-9),
            device=case.device,
            rounds=rounds,
        )
        times |= besides(case, trainer, Path(folder), rounds)
    return Measured(case, times, ratios(ours.seconds[-rounds:], bare.seconds[-rounds:]))


def besides(
    case: Case, trainer: Trainer, folder: Path, rounds: int
) -> dict[str, Timing]:
    """Time what an epoch of a run does beside its steps: validate, save."""
    data, form = trainer.images.validation, trainer.memory_format
    checkpoint = Checkpoint(folder / "checkpoint", "")

    def validation() -> float:
        return evaluate(trainer.model, data, "", True, form).loss

    def save() -> None:
        checkpoint.save(trainer.state())

    def check(name: str, loss: float | None) -> None:
        if name == "validation":
            verify(name, loss, plain_loss(trainer.model, data), tolerance=1e-4)
        else:
            saved, model = checkpoint.load(), trainer.model.state_dict()
            assert saved is not None
            verify(name, saved["model"], {k: v.cpu() for k, v in model.items()})

    calls = {"validation": validation, "checkpoint": save}
    return race(calls, check, device=case.device, rounds=rounds)


@torch.no_grad()
def plain_loss(model: nn.Module, data: Dataset) -> float:
    """Return the mean loss over a part, image by image in one batch after the other."""
    model.eval()
    losses = [
        F.cross_entropy(model(images), labels, reduction="none")
        for images, labels in data.batches(BATCH)
    ]
    return torch.cat(losses).double().mean().item()


def add_speedups(rows: list[dict]) -> None:
    """Compare each row with that of its network in float32."""
    plain = {r["network"]: r["images/s"] for r in rows if r["what"] == "float32"}
    for row in rows:
        row["speedup"] = row["images/s"] / plain[row["network"]]


def plot(rows: list[dict], path: Path) -> None:
    """Draw images per second by variant and network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(11, 3), layout="constrained", squeeze=False
    )
    for axis, network in zip(axes[0], networks, strict=True):
        chosen = [row for row in rows if row["network"] == network]
        speeds = [row["images/s"] for row in chosen]
        bars = axis.barh([row["what"] for row in chosen], speeds)
        axis.bar_label(bars, fmt=" %.0f")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        title = f"{network}, batch {chosen[0]['batch']}"
        axis.set(title=title, xlabel="images per second")
    figure.savefig(path, dpi=150)


@program("benchmarks.training")
def main(argv: Sequence[str] | None = None) -> None:
    """Run all cases and write the result file."""
    parser = arguments("training", __doc__)
    parser.add_argument("--batch", type=at_least_one, help="128 on a CPU, else 512")
    parser.add_argument("--batches", type=at_least_one, help="2 on a CPU, else 40")
    parser.add_argument("--network", choices=models.MODELS, help="this one alone")
    parser.add_argument("--what", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--threads",
        type=at_least_one,
        default=torch.get_num_threads(),
        help="1 on a busy CPU",
    )
    options = parser.parse_args(argv)
    on_cpu = torch.device(options.device).type == "cpu"
    batch, batches = options.batch or (128 if on_cpu else 512), options.batches
    torch.set_num_threads(options.threads)
    rows = []
    for network in [options.network] if options.network else ["resnet18", "resnet20"]:
        for what in options.what:
            count = batches or (2 if on_cpu else 40)
            case = Case(network, what, options.device, batch, count)
            rows.append(measure(case, options.rounds).row())
            torch.compiler.reset()
    if "float32" in options.what:
        add_speedups(rows)
    limits = ceilings(options.device)
    path = finish("training", rows, limits, options.device, options.output)
    if options.plot:
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
